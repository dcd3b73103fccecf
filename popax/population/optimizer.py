"""Optimizers and schedules of ONE user; the population vmaps them, so state and rate are each user's own."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from popax.errors import ConfigError
from popax.memo import built_once, partial_of
from popax.types import HParams

# A member's own settings -> any optax transformation. Its state must not depend on them.
Optimizer = Callable[[HParams], optax.GradientTransformation]
# (step, max_steps), scalar arrays -> factor on the user's learning rate.
Schedule = Callable[[jax.Array, jax.Array], jax.Array]


ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0}


class StandardOptimizer(NamedTuple):
    """An Optimizer of this file: its name and settings, which a run's record keeps. A member who is given no b1, b2,
    eps or weight_decay of their own has these (`settings_of`); the transformation looks at the member's."""

    name: str
    transform: Optimizer
    settings: tuple[tuple[str, float | None], ...]

    def __call__(self, own: HParams) -> optax.GradientTransformation:
        return self.transform(own)


def adamw(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0) -> Optimizer:
    """AdamW (arXiv 1711.05101). Decay acts on the user's own state only; a padded column is zero and stays zero."""
    return _standard("adamw", _adamw, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)


def sgd(*, momentum: float | None = None) -> Optimizer:
    """Plain gradient descent, with heavy-ball momentum where given."""
    return _standard("sgd", partial_of(_sgd, momentum=momentum), momentum=momentum)


def lion(*, b1: float = 0.9, b2: float = 0.99, weight_decay: float = 0.0) -> Optimizer:
    """Lion (arXiv 2302.06675)."""
    return _standard("lion", _lion, b1=b1, b2=b2, weight_decay=weight_decay)


@built_once
def _standard(name: str, transform: Optimizer, **settings: float | None) -> StandardOptimizer:
    return StandardOptimizer(name, transform, tuple(settings.items()))


def _adamw(own: HParams) -> optax.GradientTransformation:
    kept = _numbers(own)
    return optax.adamw(
        own.learning_rate, b1=kept["b1"], b2=kept["b2"], eps=kept["eps"], weight_decay=kept["weight_decay"]
    )


def _sgd(own: HParams, momentum: float | None) -> optax.GradientTransformation:
    return optax.sgd(own.learning_rate, momentum=momentum)


def _lion(own: HParams) -> optax.GradientTransformation:
    kept = _numbers(own)
    return optax.lion(own.learning_rate, b1=kept["b1"], b2=kept["b2"], weight_decay=kept["weight_decay"])


def _numbers(own: HParams) -> dict[str, Any]:
    """A made member's; optax's signatures say float, and its formulas take arrays."""
    return own._asdict()


def settings_of(optimizer: Optimizer, own: HParams) -> HParams:
    """The member's settings, with the b1, b2, eps and weight_decay that they are not given from what the optimizer was
    made with: Adam's where it does not say."""
    made = dict(ADAM) | (dict(optimizer.settings) if isinstance(optimizer, StandardOptimizer) else {})
    filled = {name: jnp.asarray(made[name], jnp.float32) for name in ADAM if getattr(own, name) is None}
    return own._replace(**filled)


def constant() -> Schedule:
    """factor = 1."""
    return partial_of(constant_factor)


def warmup_constant(*, warmup_steps: int) -> Schedule:
    """Linear up to 1 over this many steps, then 1: whatever the number of steps, and so the same when continued."""
    if not warmup_steps >= 0:
        raise ConfigError(f"warmup_constant.warmup_steps={warmup_steps}: at least 0")
    return partial_of(warmup_constant_factor, warmup_steps=warmup_steps)


def warmup_cosine(*, warmup_fraction: float = 0.1, floor: float = 0.0) -> Schedule:
    """Linear up to 1 over the first fraction of the user's own steps, then half a cosine towards `floor`.

    `floor` is where a step after the last one would be: the last that is taken is above it (arXiv 1608.03983). A
    warm-up of less than a step is none, and none takes longer than the user's steps: the rate is reached.
    """
    for name, value in (("warmup_fraction", warmup_fraction), ("floor", floor)):
        if not 0 <= value <= 1:
            raise ConfigError(f"warmup_cosine.{name}={value}: between 0 and 1")
    return partial_of(warmup_cosine_factor, warmup_fraction=warmup_fraction, floor=floor)


# Schedules are partials of these, so that a run's record has their arguments (popax.population.described).
def constant_factor(step: jax.Array, max_steps: jax.Array) -> jax.Array:
    del step, max_steps
    return jnp.ones((), jnp.float32)


def warmup_constant_factor(step: jax.Array, max_steps: jax.Array, *, warmup_steps: int) -> jax.Array:
    del max_steps
    return jnp.minimum(1.0, (step.astype(jnp.float32) + 1.0) / max(warmup_steps, 1))


def warmup_cosine_factor(step: jax.Array, max_steps: jax.Array, *, warmup_fraction: float, floor: float) -> jax.Array:
    total = jnp.maximum(max_steps, 1).astype(jnp.float32)
    warmup = warmup_fraction * total
    warm = (step.astype(jnp.float32) + 1.0) / jnp.maximum(warmup, 1.0)
    # The cosine by what remains of it: 1 + cos(pi (1 - r)) = 2 sin(pi r / 2)^2, which does not round to 0 at its end.
    left = (max_steps - step).astype(jnp.float32) / jnp.maximum(total - warmup, 1.0)
    return jnp.minimum(warm, floor + (1.0 - floor) * jnp.sin(0.5 * jnp.pi * jnp.clip(left, 0.0, 1.0)) ** 2)


def as_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer, and that of a function whose first argument is named learning_rate or rate, as optax's own are.

    Raises ConfigError on what is no function of a member's settings: an optax transformation, for instance.
    """
    if isinstance(optimizer, StandardOptimizer):
        return optimizer
    if isinstance(optimizer, optax.GradientTransformation):
        raise ConfigError(
            "optimizer: an optax transformation has a rate of its own, and here each user has theirs; give the "
            "function of it, such as popax.population.optimizer.adamw() or "
            "`lambda own: optax.adamw(own.learning_rate, b1=0.95)`"
        )
    if not _takes(optimizer, 1):
        raise ConfigError(
            f"optimizer={optimizer!r}: a function of a user's settings (popax.types.HParams) that gives an optax "
            "transformation, such as popax.population.optimizer.adamw() (adamw itself, without (), is none)"
        )
    try:
        if next(iter(inspect.signature(optimizer).parameters), "") in ("learning_rate", "rate"):
            return partial_of(of_rate, made_by=optimizer)
        jax.eval_shape(lambda: _tried(optimizer))
    except Exception as error:  # whatever a function of something else raises
        raise ConfigError(
            f"optimizer={optimizer!r} does not take a user's settings (popax.types.HParams: learning_rate, b1, ...): "
            f"{type(error).__name__}: {error}; a function of the rate alone names its argument `rate`"
        ) from error
    return optimizer


def of_rate(own: HParams, *, made_by: Callable[[Any], optax.GradientTransformation]) -> optax.GradientTransformation:
    """The transformation that a function of the learning rate alone gives."""
    return made_by(own.learning_rate)


def _tried(optimizer: Optimizer) -> Any:
    """A step of one number, to be traced."""
    one = jnp.ones((2, 2), jnp.float32)
    own = HParams(*(jnp.ones((), jnp.float32) for _ in HParams._fields))
    with jax.numpy_dtype_promotion("standard"):
        made = optimizer(own)
        return made.update({"leaf": one}, made.init({"leaf": one}), {"leaf": one})[0]


def check_schedule(schedule: Any) -> None:
    """Raises ConfigError on what is no function of (step, max_steps): a schedule of optax's, for instance."""
    if not _takes(schedule, 2):
        raise ConfigError(
            f"schedule={schedule!r}: a function (step, max_steps) of a user's own steps that gives a factor on their "
            "learning rate, such as popax.population.optimizer.warmup_cosine(); of a schedule of optax's, which gives "
            "a rate: `lambda step, max_steps: optax_schedule(step) / learning_rate`"
        )


def check_factors(schedule: Schedule, steps: int) -> None:
    """Raises ConfigError where a user who takes 1, 2 or `steps` steps would have one without a rate: the factor is not
    a finite number above 0. The schedules of this file have none for any number of steps."""
    if getattr(schedule, "func", None) in (constant_factor, warmup_constant_factor, warmup_cosine_factor):
        return
    for total in {1, min(2, steps), steps}:
        at = jnp.arange(total, dtype=jnp.int32)
        factors = np.asarray(jax.vmap(lambda step, total=total: schedule(step, jnp.int32(total)))(at))
        bad = np.flatnonzero(~(np.isfinite(factors) & (factors > 0)))
        if bad.size:
            raise ConfigError(
                f"schedule={schedule!r} gives a user of {total} steps the factor {factors[bad[0]]} at step {bad[0]} "
                "(counted from 0): such a step would teach nothing; let each that is taken be finite and above 0"
            )


def _takes(function: Any, count: int) -> bool:
    """Whether it can be called with so many positional arguments."""
    if not callable(function) or isinstance(function, type):
        return False
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # a builtin that does not say
        return True
    return True


def at_rates(updates: Any, rates: Mapping[str, float]) -> Any:
    """updates, each leaf times the factor on its learning rate, by its name; an update is in proportion to its rate."""
    if not rates:
        return updates
    return {
        site: {name: leaf * rates.get(name, 1.0) for name, leaf in leaves.items()} for site, leaves in updates.items()
    }


def clip_by_global_norm(grads: Any, max_norm: jax.Array) -> tuple[Any, jax.Array]:
    """(grads * min(1, max_norm / ||grads||), ||grads||) over all of one user's leaves; max_norm = inf never clips."""
    norm = optax.tree.norm(grads)
    factor = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), grads), norm
