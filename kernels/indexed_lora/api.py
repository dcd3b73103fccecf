"""The op as the rest of popax calls it: groups of tokens, each with the slot of its user."""

import jax

from popax.kernels.indexed_lora import reference


def indexed_lora(
    x_GxTxD: jax.Array, a_SxRxD: jax.Array, b_SxRxF: jax.Array, scale: jax.Array, slot_G: jax.Array
) -> jax.Array:
    """delta_g = s (x_g A[slot_g]^T) B[slot_g]; slot -1 gives exact zeros.

    x: [G, T, D], a group of T tokens shares a slot (T = 1: a slot per token); a: [S, R, D]; b: [S, R, F]; scale: scalar
    array; slot: int [G] in [-1, S). Returns [G, T, F] in x's dtype. Differentiable in x, a, b and scale.
    """
    return reference.indexed_lora(x_GxTxD, a_SxRxD, b_SxRxF, scale, slot_G)
