"""Optimizers and schedules of ONE user; the population vmaps them, so state and rate are each user's own."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

# learning rate (scalar array) -> any optax transformation. Its state must not depend on the learning rate.
Optimizer = Callable[[jax.Array], optax.GradientTransformation]
# (step, max_steps), scalar arrays -> factor on the user's learning rate.
Schedule = Callable[[jax.Array, jax.Array], jax.Array]


def adamw(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0) -> Optimizer:
    """AdamW (arXiv 1711.05101). Decay acts on the user's own state only; a padded column is zero and stays zero."""
    return functools.partial(optax.adamw, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)


def sgd(*, momentum: float | None = None) -> Optimizer:
    """Plain gradient descent, with heavy-ball momentum where given."""
    return functools.partial(optax.sgd, momentum=momentum)


def lion(*, b1: float = 0.9, b2: float = 0.99, weight_decay: float = 0.0) -> Optimizer:
    """Lion (arXiv 2302.06675)."""
    return functools.partial(optax.lion, b1=b1, b2=b2, weight_decay=weight_decay)


def constant() -> Schedule:
    """factor = 1."""
    return lambda step, max_steps: jnp.ones((), jnp.float32)


def warmup_constant(*, warmup_steps: int) -> Schedule:
    """Linear from 0 over this many steps, then 1: whatever the number of steps, and so the same when continued."""
    return lambda step, max_steps: jnp.minimum(1.0, (step.astype(jnp.float32) + 1.0) / max(warmup_steps, 1))


def warmup_cosine(*, warmup_fraction: float = 0.1, floor: float = 0.0) -> Schedule:
    """Linear from 0 over the first fraction of the user's own steps, then half a cosine down to `floor`."""

    def factor(step: jax.Array, max_steps: jax.Array) -> jax.Array:
        total = jnp.maximum(max_steps, 1).astype(jnp.float32)
        done = (step.astype(jnp.float32) + 1.0) / total
        warm = done / max(warmup_fraction, 1e-9)
        progress = jnp.clip((done - warmup_fraction) / max(1.0 - warmup_fraction, 1e-9), 0.0, 1.0)
        return jnp.minimum(warm, floor + (1.0 - floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress)))

    return factor


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
