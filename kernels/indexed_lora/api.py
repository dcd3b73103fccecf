"""The op as the rest of popax calls it: groups of tokens, each with the slot of its user."""

from typing import cast

import jax
import jax.numpy as jnp

from popax.kernels import dispatch, target
from popax.kernels.indexed_lora import reference, vjp


def indexed_lora(
    x_GxTxD: jax.Array,
    a_SxRxD: jax.Array,
    b_SxRxF: jax.Array,
    scale: jax.Array,
    slot_G: jax.Array,
    y_GxTxF: jax.Array | None = None,
) -> jax.Array:
    """y_g + s (x_g A[slot_g]^T) B[slot_g]; slot -1 gives y's very bytes, or exact zeros without y.

    x: [G, T, D], a group of T tokens shares a slot (T = 1: a slot per token); a: [S, R, D]; b: [S, R, F]; scale: scalar
    array; slot: int [G] in [-1, S). Returns [G, T, F] in y's dtype, or x's. Differentiable in x, a, b, scale and y.
    """
    if target.platform() not in dispatch.BACKENDS:
        delta_GxTxF = reference.indexed_lora(x_GxTxD, a_SxRxD, b_SxRxF, scale, slot_G)
        if y_GxTxF is None:
            return delta_GxTxF
        return jnp.where((slot_G >= 0)[:, None, None], y_GxTxF + delta_GxTxF.astype(y_GxTxF.dtype), y_GxTxF)
    (groups, tokens, d_in), (slots, _, d_out) = x_GxTxD.shape, b_SxRxF.shape
    y_MxF = jnp.zeros((groups * tokens, d_out), x_GxTxD.dtype) if y_GxTxF is None else y_GxTxF.reshape(-1, d_out)
    slot_M = jnp.repeat(slot_G.astype(jnp.int32), tokens)
    operands = (x_GxTxD.reshape(-1, d_in), a_SxRxD, b_SxRxF, jnp.broadcast_to(scale, (slots,)), slot_M)
    operands = (*operands, vjp.full_rank(a_SxRxD), y_MxF)
    out_MxF = vjp.decode(*operands) if tokens == 1 else vjp.grouped(groups, *operands)
    return cast(jax.Array, out_MxF).reshape(groups, tokens, d_out)
