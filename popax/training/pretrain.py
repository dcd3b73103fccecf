"""Pretraining of a small base: every parameter trained on a mixed stream. Resumable, bitwise."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from popax.adapters.masters import masters, rounded
from popax.errors import ConfigError
from popax.modeling.model import Model
from popax.modeling.remat import Remat, check_remat
from popax.objectives.base import mean_of
from popax.objectives.sft import sft
from popax.population.guard import all_finite, keep_unless, none_broken
from popax.population.optimizer import Schedule, warmup_cosine
from popax.training.config import check_rate
from popax.training.fit import BatchesAhead, fit
from popax.types import NO_ADAPT, Batch, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """AdamW with warm-up and cosine decay towards a tenth; weight decay on matrices only."""

    steps: int = 400
    learning_rate: float = 3e-3
    warmup_steps: int = 40
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    b2: float = 0.98
    checkpoint_every: int = 100
    seed: int = 0
    remat: Remat = "none"

    def __post_init__(self):
        if self.steps < 1 or not 0 <= self.warmup_steps < self.steps:
            raise ConfigError(f"steps={self.steps}, warmup_steps={self.warmup_steps}: 0 <= warmup_steps < steps")
        check_remat(self.remat, "PretrainConfig")
        check_rate(self.learning_rate, "PretrainConfig")
        if self.checkpoint_every < 1:
            raise ConfigError(f"checkpoint_every={self.checkpoint_every}: at least 1")


class PretrainState(NamedTuple):
    """What a checkpoint holds. Parameters are float32 masters, and so is the optimizer's state, whatever the model's
    param_dtype: what the model sees of them is what it will be saved as (popax.adapters.masters)."""

    step: jax.Array
    params: Params
    opt_state: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainHooks:
    """on_start(step): called once, with the step of the checkpoint that is continued, 0 for a new run.

    on_step(step, loss in nats per target): called for each step, one step late so that the device never waits.
    """

    on_start: Callable[[int], None] = lambda step: None
    on_step: Callable[[int, float], None] = lambda step, loss: None
    stop_requested: Callable[[], bool] = lambda: False


def schedule(config: PretrainConfig) -> Schedule:
    """A factor on the learning rate, above 0 at every step."""
    return warmup_cosine(warmup_fraction=config.warmup_steps / config.steps, floor=0.1)


def optimizer(config: PretrainConfig) -> optax.GradientTransformation:
    """The transformation of this config."""
    factor = schedule(config)

    def rate(step: Any) -> jax.Array:
        return config.learning_rate * factor(jnp.asarray(step), jnp.int32(config.steps))

    def matrices(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: path[-1].key in ("kernel", "embedding"), params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(rate, b2=config.b2, weight_decay=config.weight_decay, mask=matrices),
    )


def pretrain(
    model: Model,
    batch_at: Callable[[int], Batch],
    config: PretrainConfig,
    *,
    directory: Path | None = None,
    hooks: PretrainHooks | None = None,
) -> tuple[Params, int]:
    """Train from scratch; batch_at(step) is a pure function. Returns the parameters and the number of steps done.

    A step whose loss, gradient or update is not finite changes nothing but the count of steps.

    directory: where checkpoints go, and where a stopped run is found again; None keeps none.
    """
    hooks = hooks or PretrainHooks()
    if model.config.quantise is not None:
        raise ConfigError(
            "ModelConfig.quantise: a quantised base is frozen; train it in full, and quantise it when it is read"
        )
    transform = optimizer(config)
    state = _start(model, transform, config)
    saved = _Checkpoints(directory) if directory is not None else None
    if saved is not None:
        state = saved.restore(state)
    objective, saved_as = sft(model, remat=config.remat, frozen_base=False), functools.partial(_rounded, model)
    step_fn = jax.jit(functools.partial(_step, objective, transform, saved_as), donate_argnums=0)
    done = int(state.step)
    hooks.on_start(done)
    late: list[tuple[int, jax.Array]] = []  # the loss of the step before, which the device has by now

    def on_step(count: int, state: PretrainState, loss: jax.Array) -> None:
        tell()
        late.append((count, loss))
        if saved is not None and count % config.checkpoint_every == 0:
            saved.save(state)

    def tell() -> None:
        for count, loss in late:
            hooks.on_step(count, float(loss))
        late.clear()

    with BatchesAhead(batch_at) as batches:
        state = fit(
            state,
            steps=config.steps,
            step=step_fn,
            batches=batches,
            begins=done,
            on_step=on_step,
            stop=hooks.stop_requested,
        )
    tell()
    if saved is not None:
        saved.save(state)
        saved.close()
    params = jax.jit(saved_as)(state.params)
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), params, model.abstract()), int(state.step)


def _start(model: Model, transform: optax.GradientTransformation, config: PretrainConfig) -> PretrainState:
    params = masters(model.init(jax.random.key(config.seed)))
    return PretrainState(jnp.zeros((), jnp.int32), params, transform.init(params))


def _rounded(model: Model, params: Params) -> Params:
    """The values that the model's own dtypes have, in float32, with the gradient of the identity."""
    return jax.tree.map(
        lambda leaf, like: leaf if like.dtype == leaf.dtype else rounded(leaf, like.dtype.name),
        params,
        model.abstract(),
    )


def _step(objective, transform, saved_as, state: PretrainState, batch: Batch) -> tuple[PretrainState, jax.Array]:
    loss_of = lambda params: mean_of(objective)(saved_as(params), NO_ADAPT, batch)  # noqa: E731
    (loss, _), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        params = cast(Params, optax.apply_updates(state.params, updates))
    finite = jnp.isfinite(loss) & all_finite(saved_as(params)) & none_broken(opt_state, state.opt_state)
    params, opt_state = keep_unless(finite, (params, opt_state), (state.params, state.opt_state))
    return PretrainState(state.step + 1, params, opt_state), loss


class _Checkpoints:
    """The newest two states, each visible only when whole."""

    def __init__(self, directory: Path):
        self._manager = ocp.CheckpointManager(
            directory.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        )

    def restore(self, like: PretrainState) -> PretrainState:
        latest = self._manager.latest_step()
        if latest is None:
            return like
        return cast(PretrainState, self._manager.restore(latest, args=ocp.args.StandardRestore(like)))  # pyright: ignore

    def save(self, state: PretrainState) -> None:
        step = int(np.asarray(state.step))
        if step != self._manager.latest_step():
            # Waiting keeps the donated buffers of the next step out of the write.
            self._manager.save(step, args=ocp.args.StandardSave(state))
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
