"""Rows of many slots in plain XLA: gather factors, then batched products. The oracle and the form where no kernel runs.

The rows are `runs` stretches (G) of equal length (T), each of one slot: factors are gathered once a stretch, so that
with a stretch a row it is a gather a row.
"""

import jax
import jax.numpy as jnp

from popax.kernels.indexed_lora.slots import take_slots
from popax.kernels.rows import nobody


def forward(
    x_MxD: jax.Array,
    a_SxRxD: jax.Array,
    b_SxRxF: jax.Array,
    scale_S: jax.Array,
    slot_M: jax.Array,
    rank_S: jax.Array,
    y_MxF: jax.Array | None = None,
    *,
    runs: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(y_m + s (x_m A[slot_m]^T) B[slot_m], h_RxM): y's bytes where the slot is nobody's (-1 or out of range).

    x: [M, D]; rank: int [S], rows beyond it count as absent. The first result is in y's dtype, x's without y.
    """
    x_GxTxD, slot_G = _stretches(x_MxD, runs), _stretches(slot_M, runs)[:, 0]
    factors = (_factor(a_SxRxD, slot_G, rank_S, x_MxD.dtype), _factor(b_SxRxF, slot_G, rank_S, x_MxD.dtype))
    h_GxTxR = _einsum("gtd,grd->gtr", x_GxTxD, factors[0])
    scaled_GxTxR = (h_GxTxR * _scale(scale_S, slot_G).astype(h_GxTxR.dtype)).astype(x_MxD.dtype)
    delta_GxTxF = _einsum("gtr,grf->gtf", scaled_GxTxR, factors[1])
    h_RxM = h_GxTxR.reshape(x_MxD.shape[0], -1).T.astype(x_MxD.dtype)
    delta_MxF = delta_GxTxF.reshape(x_MxD.shape[0], -1)
    if y_MxF is None:
        return delta_MxF.astype(x_MxD.dtype), h_RxM
    own_M = (slot_M >= 0) & (slot_M < a_SxRxD.shape[0])
    return jnp.where(own_M[:, None], y_MxF + delta_MxF.astype(y_MxF.dtype), y_MxF), h_RxM


def backward(
    g_MxF: jax.Array,
    x_MxD: jax.Array,
    h_RxM: jax.Array,
    a_SxRxD: jax.Array,
    b_SxRxF: jax.Array,
    scale_S: jax.Array,
    slot_M: jax.Array,
    rank_S: jax.Array,
    *,
    runs: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(dx, dA, dB, ds) for the cotangent g of the first result; y's is g itself. ds: [S]."""
    dtype, (slots, rank, _) = x_MxD.dtype, a_SxRxD.shape
    slot_G = _stretches(slot_M, runs)[:, 0]
    a_GxRxD, b_GxRxF = (_factor(factor, slot_G, rank_S, dtype) for factor in (a_SxRxD, b_SxRxF))
    key_G = nobody(slot_G, slots)
    own_Gx1x1 = (key_G < slots)[:, None, None]
    live_Gx1xR = (jnp.arange(rank)[None] < take_slots(rank_S, slot_G)[:, None])[:, None]
    zero = jnp.zeros((), dtype)
    g_GxTxF = jnp.where(own_Gx1x1, _stretches(g_MxF, runs).astype(dtype), zero)
    x_GxTxD = jnp.where(own_Gx1x1, _stretches(x_MxD, runs), zero)
    h_GxTxR = jnp.where(live_Gx1xR, _stretches(h_RxM.T, runs), zero)
    gb_GxTxR = _einsum("gtf,grf->gtr", g_GxTxF, b_GxRxF)
    scale_Gx1x1, wide = _scale(scale_S, slot_G).astype(gb_GxTxR.dtype), gb_GxTxR.dtype
    dh_GxTxR, scaled_GxTxR = (gb_GxTxR * scale_Gx1x1).astype(dtype), (h_GxTxR.astype(wide) * scale_Gx1x1).astype(dtype)
    dx_MxD = _einsum("gtr,grd->gtd", dh_GxTxR, a_GxRxD).astype(dtype).reshape(x_MxD.shape)

    def by_slot(rows_Gx: jax.Array, like_Sx: jax.Array) -> jax.Array:
        return jnp.zeros(like_Sx.shape, wide).at[key_G].add(rows_Gx, mode="drop").astype(like_Sx.dtype)

    da_SxRxD = by_slot(_einsum("gtr,gtd->grd", dh_GxTxR, x_GxTxD), a_SxRxD)
    db_SxRxF = by_slot(_einsum("gtr,gtf->grf", scaled_GxTxR, g_GxTxF), b_SxRxF)
    ds_S = by_slot(jnp.sum(gb_GxTxR * h_GxTxR.astype(wide), axis=(1, 2)), scale_S)
    return dx_MxD, da_SxRxD, db_SxRxF, ds_S


def _stretches(rows_M: jax.Array, runs: int | None) -> jax.Array:
    return rows_M.reshape(rows_M.shape[0] if runs is None else runs, -1, *rows_M.shape[1:])


def _scale(scale_S: jax.Array, slot_G: jax.Array) -> jax.Array:
    return take_slots(scale_S, slot_G)[:, None, None]


def _factor(factor_SxRxD, slot_G, rank_S, dtype) -> jax.Array:
    live_GxR = jnp.arange(factor_SxRxD.shape[1])[None] < take_slots(rank_S, slot_G)[:, None]
    return jnp.where(live_GxR[..., None], take_slots(factor_SxRxD, slot_G), jnp.zeros((), factor_SxRxD.dtype)).astype(
        dtype
    )


def _einsum(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    accumulate = jnp.float64 if left.dtype == jnp.float64 else jnp.float32
    return jnp.einsum(subscripts, left, right, preferred_element_type=accumulate)
