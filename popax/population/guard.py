"""What of a step is accepted: all of it where all of it is finite, and nothing else."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def all_finite(tree: Any) -> jax.Array:
    """Whether every number of every leaf is."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def none_broken(new: Any, old: Any) -> jax.Array:
    """Whether each number of an optimizer's state is finite that was so; some begin with an inf of their own."""
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    floats = [(fresh, kept) for fresh, kept in pairs if jnp.issubdtype(fresh.dtype, jnp.inexact)]
    whole = [jnp.all(jnp.isfinite(fresh) | ~jnp.isfinite(kept)) for fresh, kept in floats]
    return jnp.all(jnp.stack(whole)) if whole else jnp.asarray(True)


def keep_unless(accept: jax.Array, new: T, old: T) -> T:
    """`new` where it is accepted, else the bits of `old`."""
    return jax.tree.map(lambda fresh, kept: jnp.where(accept, fresh, kept), new, old)
