"""Copies of tokens as rows sorted by expert, and back: a copy for each expert that a token goes to.

An expert id of E means "none of these": such copies are sorted to the end and add nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sorted(NamedTuple):
    """R rows sorted by expert. order_R: the copy (token K + k) of a row; place_MxK: its inverse.

    sizes_G: the rows of each group where those of an expert were sorted further; else sizes_E.
    """

    order_R: jax.Array
    place_MxK: jax.Array
    sizes_E: jax.Array
    sizes_G: jax.Array

    @property
    def token_R(self) -> jax.Array:
        return self.order_R // self.place_MxK.shape[1]

    def of_copies(self, copies_MxK: jax.Array) -> jax.Array:
        """What belongs to copies, at their rows: [R]."""
        return copies_MxK.reshape(-1)[self.order_R]

    def of_tokens(self, x_MxD: jax.Array) -> jax.Array:
        """What belongs to tokens, at the rows of their copies: [R, D]."""
        return x_MxD[self.token_R]

    def to_tokens(self, out_RxD: jax.Array) -> jax.Array:
        """The sum of each token's rows, in the rows' dtype (jnp.sum adds up what is narrower in float32)."""
        return jnp.sum(self.to_copies(out_RxD), axis=1)

    def to_copies(self, out_RxD: jax.Array) -> jax.Array:
        """[M, K, D]: the row of each copy; zero for a copy of no expert, whose row holds nothing meant."""
        present_MxK = self.place_MxK < jnp.sum(self.sizes_E, dtype=jnp.int32)
        picked_MxKxD = out_RxD[jnp.where(present_MxK, self.place_MxK, 0)]
        return jnp.where(present_MxK[..., None], picked_MxKxD, jnp.zeros((), out_RxD.dtype))


def sort_copies(expert_MxK: jax.Array, num_experts: int, part_Mx1: jax.Array | None = None, parts: int = 1) -> Sorted:
    """Rows in the order of experts, those of one expert in the order of their tokens' part in [0, parts).

    A token has each expert at most once, so rows beyond M min(K, E) cannot belong to one and are cut off.
    """
    (tokens, copies), groups = expert_MxK.shape, num_experts * parts
    group_MxK = expert_MxK if part_Mx1 is None else expert_MxK * parts + part_Mx1
    flat = group_MxK.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    bounds = jnp.searchsorted(flat[order], jnp.arange(groups, dtype=flat.dtype), side="right").astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)
    sizes_G = jnp.diff(bounds, prepend=jnp.zeros(1, jnp.int32))
    sizes_E = sizes_G if parts == 1 else jnp.sum(sizes_G.reshape(num_experts, parts), axis=1, dtype=jnp.int32)
    return Sorted(order[: most_rows(expert_MxK, num_experts)], place.reshape(tokens, copies), sizes_E, sizes_G)


def most_rows(expert_MxK: jax.Array, num_experts: int) -> int:
    """How many copies can belong to an expert."""
    tokens, copies = expert_MxK.shape
    return tokens * min(copies, num_experts)
