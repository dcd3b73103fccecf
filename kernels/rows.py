"""Small facts about rows and their slots, computed on the device, that kernels' work lists are made of."""

import jax
import jax.numpy as jnp

MOST_PAIRS = 1 << 22


def nobody(slot: jax.Array, slots: int) -> jax.Array:
    """The slot, with `slots` in place of -1 and of everything out of range."""
    return jnp.where((slot < 0) | (slot >= slots), slots, slot).astype(jnp.int32)


def starts(key_M: jax.Array) -> jax.Array:
    """bool [M]: where a stretch of equal keys begins."""
    return jnp.concatenate([jnp.ones((1,), bool), key_M[1:] != key_M[:-1]])


def search(sorted_M: jax.Array, value_V: jax.Array, *, side: str) -> jax.Array:
    """int32 [V]: `jnp.searchsorted`, in one fused comparison of all pairs where they are few.

    Its loop takes log2(M) steps one after the other, each longer on an accelerator than all the comparisons.
    """
    few = sorted_M.shape[0] * value_V.shape[0] <= MOST_PAIRS
    return jnp.searchsorted(sorted_M, value_V, side=side, method="compare_all" if few else "scan").astype(jnp.int32)


def places(mask_M: jax.Array, most: int) -> jax.Array:
    """int32 [most]: the indices where the mask is true, in order, then M.

    A search in the running count, and not `jnp.nonzero`, which scatters.
    """
    count_M = jnp.cumsum(mask_M.astype(jnp.int32))
    return search(count_M, jnp.arange(1, most + 1, dtype=jnp.int32), side="left")


def segment_sums(value_M: jax.Array, key_M: jax.Array, segments: int) -> jax.Array:
    """sum of value over the rows of each key: [segments]; zero where a key has none, keys beyond are left out.

    One fused comparison of all pairs, and not a scatter: no sum ever meets another segment's values, so that a NaN
    stays where it is, and the order of the additions is fixed. Pairs are few beside what a row's features cost.
    """
    own_SxM = jnp.arange(segments, dtype=key_M.dtype)[:, None] == key_M[None]
    return jnp.sum(jnp.where(own_SxM, value_M[None], jnp.zeros((), value_M.dtype)), axis=1)
