"""The op in plain XLA: gather each group's factors, then batched products. Cost: tokens x rank, not x slots.

Shape letters: G groups, T tokens of a group, S slots, D in, F out, R rank.
"""

import jax
import jax.numpy as jnp

from popax.kernels.indexed_lora.slots import take_slots


def indexed_lora(
    x_GxTxD: jax.Array, a_SxRxD: jax.Array, b_SxRxF: jax.Array, scale: jax.Array, slot_G: jax.Array
) -> jax.Array:
    """delta_GxTxF; groups with slot -1 get zeros."""
    a_GxRxD = take_slots(a_SxRxD, slot_G).astype(x_GxTxD.dtype)
    b_GxRxF = take_slots(b_SxRxF, slot_G).astype(x_GxTxD.dtype)
    accumulate = jnp.float64 if x_GxTxD.dtype == jnp.float64 else jnp.float32
    h_GxTxR = jnp.einsum("gtd,grd->gtr", x_GxTxD, a_GxRxD, preferred_element_type=accumulate)
    scaled_GxTxR = (h_GxTxR * scale.astype(accumulate)).astype(x_GxTxD.dtype)
    delta_GxTxF = jnp.einsum("gtr,grf->gtf", scaled_GxTxR, b_GxRxF, preferred_element_type=accumulate)
    return delta_GxTxF.astype(x_GxTxD.dtype)
