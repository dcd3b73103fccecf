"""jax's own grouped matmul for TPU as a rival: rows sorted by slot, factors with the rank as their minor dimension."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from popax.kernels.op import Op


def megablox(op: Op) -> dict[str, Callable[..., Any]]:
    """{"megablox": form} for the forward ops that it can stand in for; empty for the others."""
    forms = {"stacked_lora.forward": _stacked, "indexed_lora.grouped": _grouped}
    return {"megablox": forms[op.name]} if op.name in forms else {}


def _update(x_MxD, a_SxRxD, b_SxRxF, scale_M, sizes_S):
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    h_MxR = gmm(x_MxD, a_SxRxD, sizes_S, preferred_element_type=jnp.float32, transpose_rhs=True)
    scaled_MxR = (h_MxR * scale_M[:, None]).astype(x_MxD.dtype)
    return gmm(scaled_MxR, b_SxRxF, sizes_S, preferred_element_type=jnp.float32), h_MxR


def _stacked(x_NxTxD, a_NxRxD, b_NxRxF, scale_N, y_NxTxF):
    users, tokens, d_in = x_NxTxD.shape
    sizes_N = jnp.full((users,), tokens, jnp.int32)
    x_MxD = x_NxTxD.reshape(-1, d_in)
    delta_MxF, h_MxR = _update(x_MxD, a_NxRxD, b_NxRxF, jnp.repeat(scale_N, tokens), sizes_N)
    h_NxRxT = h_MxR.reshape(users, tokens, -1).transpose(0, 2, 1).astype(x_NxTxD.dtype)
    return y_NxTxF + delta_MxF.reshape(y_NxTxF.shape).astype(y_NxTxF.dtype), h_NxRxT


def _grouped(x_MxD, a_SxRxD, b_SxRxF, scale_S, slot_M, rank_S, y_MxF):
    """Every row has a slot, and every slot its full rank, as in the specs."""
    del rank_S
    order_M = jnp.argsort(slot_M, stable=True)
    sizes_S = jnp.bincount(slot_M, length=a_SxRxD.shape[0]).astype(jnp.int32)
    delta_MxF, h_MxR = _update(x_MxD[order_M], a_SxRxD, b_SxRxF, scale_S[slot_M[order_M]], sizes_S)
    h_RxM = jnp.zeros_like(h_MxR).at[order_M].set(h_MxR).T.astype(x_MxD.dtype)
    return y_MxF.at[order_M].add(delta_MxF.astype(y_MxF.dtype)), h_RxM
