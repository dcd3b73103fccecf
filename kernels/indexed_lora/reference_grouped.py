"""Rows of many slots in plain XLA: gather each row's factors, then batched products. The oracle and the CPU path."""

import jax
import jax.numpy as jnp

from popax.kernels.indexed_lora.slots import take_slots


def forward(
    x_MxD: jax.Array,
    a_SxRxD: jax.Array,
    b_SxRxF: jax.Array,
    scale_S: jax.Array,
    slot_M: jax.Array,
    rank_S: jax.Array,
    y_MxF: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(y_m + s (x_m A[slot_m]^T) B[slot_m], h_RxM): y's bytes where the slot is nobody's (-1 or out of range).

    x: [M, D]; rank: int [S], rows beyond it count as absent. The first result is in y's dtype, x's without y.
    """
    factors = (_factor(a_SxRxD, slot_M, rank_S, x_MxD.dtype), _factor(b_SxRxF, slot_M, rank_S, x_MxD.dtype))
    h_RxM = _einsum("md,mrd->rm", x_MxD, factors[0])
    scaled_RxM = (h_RxM * take_slots(scale_S, slot_M)[None].astype(h_RxM.dtype)).astype(x_MxD.dtype)
    delta_MxF = _einsum("rm,mrf->mf", scaled_RxM, factors[1])
    h_RxM = h_RxM.astype(x_MxD.dtype)
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
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(dx, dA, dB, ds) for the cotangent g of the first result; y's is g itself. ds: [S]."""
    dtype, slots = x_MxD.dtype, a_SxRxD.shape[0]
    a_MxRxD, b_MxRxF = (_factor(factor, slot_M, rank_S, dtype) for factor in (a_SxRxD, b_SxRxF))
    key_M = jnp.where((slot_M < 0) | (slot_M >= slots), slots, slot_M)
    live_RxM = jnp.arange(a_SxRxD.shape[1])[:, None] < take_slots(rank_S, slot_M)[None]
    g_MxF = jnp.where((key_M < slots)[:, None], g_MxF, jnp.zeros((), g_MxF.dtype)).astype(dtype)
    x_MxD = jnp.where((key_M < slots)[:, None], x_MxD, jnp.zeros((), dtype))
    h_RxM = jnp.where(live_RxM, h_RxM, jnp.zeros((), dtype))
    scale_1xM = take_slots(scale_S, slot_M)[None]
    gb_RxM = _einsum("mf,mrf->rm", g_MxF, b_MxRxF)
    dh_RxM = (gb_RxM * scale_1xM.astype(gb_RxM.dtype)).astype(dtype)
    scaled_RxM = (h_RxM.astype(gb_RxM.dtype) * scale_1xM.astype(gb_RxM.dtype)).astype(dtype)
    dx_MxD = _einsum("rm,mrd->md", dh_RxM, a_MxRxD).astype(dtype)

    def by_slot(h_RxM, x_MxD, factor):
        rows_MxRxD = h_RxM.T[:, :, None].astype(gb_RxM.dtype) * x_MxD[:, None, :].astype(gb_RxM.dtype)
        return jnp.zeros(factor.shape, gb_RxM.dtype).at[key_M].add(rows_MxRxD, mode="drop").astype(factor.dtype)

    ds_M = jnp.sum(gb_RxM * h_RxM.astype(gb_RxM.dtype), axis=0)
    ds_S = jnp.zeros((slots,), gb_RxM.dtype).at[key_M].add(ds_M, mode="drop").astype(scale_S.dtype)
    return dx_MxD, by_slot(dh_RxM, x_MxD, a_SxRxD), by_slot(scaled_RxM, g_MxF, b_SxRxF), ds_S


def _factor(factor_SxRxD, slot_M, rank_S, dtype) -> jax.Array:
    live_MxR = jnp.arange(factor_SxRxD.shape[1])[None] < take_slots(rank_S, slot_M)[:, None]
    return jnp.where(live_MxR[..., None], take_slots(factor_SxRxD, slot_M), jnp.zeros((), factor_SxRxD.dtype)).astype(
        dtype
    )


def _einsum(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    accumulate = jnp.float64 if left.dtype == jnp.float64 else jnp.float32
    return jnp.einsum(subscripts, left, right, preferred_element_type=accumulate)
