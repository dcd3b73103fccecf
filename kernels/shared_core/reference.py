"""The op in plain XLA: the oracle of every other implementation, and the CPU path.

Shape letters: N population, T tokens, M rows, G groups, S slots, D in, F out, R rank (q of a core's result, r of its
argument). A core is a matrix [.., R, R] or a diagonal [.., R]. Products accumulate in float32 whatever the inputs are.
"""

import jax
import jax.numpy as jnp

from popax.kernels.indexed_lora.slots import take_slots


def forward(
    x_NxTxD: jax.Array,
    a_RxD: jax.Array,
    b_RxF: jax.Array,
    core_N: jax.Array,
    scale_N: jax.Array,
    y_NxTxF: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(y + s core(h) B, h_NxRxT = A x^T): the first in y's dtype, in x's where there is no y; h in x's."""
    dtype = x_NxTxD.dtype
    h_NxRxT = _contract("ntd,rd->nrt", x_NxTxD, a_RxD).astype(dtype)
    mixed_NxRxT = mix(core_N, h_NxRxT) * _wide(scale_N)
    delta_NxTxF = _contract("nrt,rf->ntf", mixed_NxRxT.astype(dtype), b_RxF).astype(dtype)
    out_NxTxF = delta_NxTxF if y_NxTxF is None else y_NxTxF + delta_NxTxF.astype(y_NxTxF.dtype)
    return out_NxTxF, h_NxRxT


def one_user(
    x_TxD: jax.Array, a_RxD: jax.Array, b_RxF: jax.Array, core: jax.Array, scale: jax.Array, y_TxF: jax.Array | None
) -> jax.Array:
    """y + s core(x A^T) B: the CPU path, differentiated as it stands.

    The rank is minor here. A TPU would pad it to its lanes; a CPU would only move arrays about to have it elsewhere.
    """
    dtype, wide = x_TxD.dtype, _accumulator(x_TxD.dtype)
    h_TxR = _contract("td,rd->tr", x_TxD, a_RxD).astype(dtype)
    if core.ndim == 2:
        mixed_TxR = _contract("tr,qr->tq", h_TxR, core)
    else:
        mixed_TxR = h_TxR.astype(wide) * core.astype(dtype).astype(wide)[None]
    delta_TxF = _contract("tr,rf->tf", (mixed_TxR * scale.astype(wide)).astype(dtype), b_RxF).astype(dtype)
    return delta_TxF if y_TxF is None else y_TxF + delta_TxF.astype(y_TxF.dtype)


def backward(
    g_NxTxF: jax.Array,
    h_NxRxT: jax.Array,
    a_RxD: jax.Array,
    b_RxF: jax.Array,
    core_N: jax.Array,
    scale_N: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dx, dcore, ds) for the cotangent g of the output; y's is g itself.

    gb = B g^T, dC = s gb h^T (dd = s sum of gb * h), ds = <gb, core(h)>, dx = (s core^T(gb))^T A in h's dtype.
    """
    dtype = h_NxRxT.dtype
    gb_NxRxT = _contract("ntf,rf->nrt", g_NxTxF.astype(dtype), b_RxF)
    scaled_NxRxT = (gb_NxRxT * _wide(scale_N)).astype(dtype)
    dh_NxRxT = mix(transposed(core_N), scaled_NxRxT).astype(dtype)
    dx_NxTxD = _contract("nrt,rd->ntd", dh_NxRxT, a_RxD).astype(dtype)
    subscripts = "nqt,nrt->nqr" if core_N.ndim == 3 else "nrt,nrt->nr"
    dcore_N = _contract(subscripts, scaled_NxRxT, h_NxRxT).astype(core_N.dtype)
    ds_N = jnp.sum(gb_NxRxT * mix(core_N, h_NxRxT), axis=(1, 2)).astype(scale_N.dtype)
    return dx_NxTxD, dcore_N, ds_N


def indexed_forward(
    x_MxD: jax.Array,
    a_RxD: jax.Array,
    b_RxF: jax.Array,
    core_S: jax.Array,
    scale_S: jax.Array,
    slot_M: jax.Array,
    rank_S: jax.Array,
    y_MxF: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(y_m + s core[slot_m](h_m) B, h_RxM): y's bytes where the slot is nobody's (-1 or out of range).

    rank: int [S], a core's entries beyond it count as zero. h = A x^T is every row's, in x's dtype.
    """
    dtype = x_MxD.dtype
    h_RxM = _contract("md,rd->rm", x_MxD, a_RxD).astype(dtype)
    core_M, own_M = live_cores(core_S, rank_S, slot_M), owned(slot_M, core_S.shape[0])
    mixed_RxM = mix(core_M, jnp.where(own_M, h_RxM, jnp.zeros((), dtype)).T[:, :, None])[..., 0].T
    scaled_RxM = (mixed_RxM * take_slots(scale_S, slot_M)[None].astype(mixed_RxM.dtype)).astype(dtype)
    delta_MxF = _contract("rm,rf->mf", scaled_RxM, b_RxF).astype(y_MxF.dtype)
    return jnp.where(own_M[:, None], y_MxF + delta_MxF, y_MxF), h_RxM


def indexed_backward(
    g_MxF: jax.Array,
    h_RxM: jax.Array,
    a_RxD: jax.Array,
    b_RxF: jax.Array,
    core_S: jax.Array,
    scale_S: jax.Array,
    slot_M: jax.Array,
    rank_S: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dx, dcore, ds) for the cotangent g of the first result; exact zeros without a row, and beyond a rank."""
    dtype, slots = h_RxM.dtype, core_S.shape[0]
    core_M, own_M = live_cores(core_S, rank_S, slot_M), owned(slot_M, slots)
    zero = jnp.zeros((), dtype)
    g_MxF = jnp.where(own_M[:, None], g_MxF.astype(dtype), zero)
    h_MxRx1 = jnp.where(own_M, h_RxM, zero).T[:, :, None]
    gb_MxR = _contract("mf,rf->mr", g_MxF, b_RxF)
    scaled_MxR = (gb_MxR * take_slots(scale_S, slot_M)[:, None].astype(gb_MxR.dtype)).astype(dtype)
    dh_MxR = mix(transposed(core_M), scaled_MxR[:, :, None])[..., 0].astype(dtype)
    dx_MxD = _contract("mr,rd->md", dh_MxR, a_RxD).astype(dtype)
    scaled_MxR, h_MxR = scaled_MxR.astype(gb_MxR.dtype), h_MxRx1[..., 0].astype(gb_MxR.dtype)
    gradient_M = scaled_MxR[:, :, None] * h_MxR[:, None] if core_S.ndim == 3 else scaled_MxR * h_MxR
    ds_M = jnp.sum(gb_MxR * mix(core_M, h_MxRx1)[..., 0], axis=1)
    key_M = jnp.where(own_M, slot_M, slots)
    dcore_S = jnp.zeros(core_S.shape, gb_MxR.dtype).at[key_M].add(gradient_M, mode="drop")
    dcore_S = jnp.where(live(core_S.shape, rank_S), dcore_S, jnp.zeros((), gb_MxR.dtype))
    ds_S = jnp.zeros(scale_S.shape, gb_MxR.dtype).at[key_M].add(ds_M, mode="drop")
    return dx_MxD, dcore_S.astype(core_S.dtype), ds_S.astype(scale_S.dtype)


def grouped(
    x_GxTxD: jax.Array,
    a_RxD: jax.Array,
    b_RxF: jax.Array,
    core_S: jax.Array,
    scale: jax.Array,
    slot_G: jax.Array,
    rank_S: jax.Array | None,
    y_GxTxF: jax.Array,
) -> jax.Array:
    """y_g + s core[slot_g](x_g A^T) B, a core gathered once for a group: the CPU path, differentiated as it stands."""
    core_G = take_slots(core_S, slot_G) if rank_S is None else live_cores(core_S, rank_S, slot_G)
    own_G = owned(slot_G, core_S.shape[0])
    x_GxTxD = jnp.where(own_G[:, None, None], x_GxTxD, jnp.zeros((), x_GxTxD.dtype))
    out_GxTxF, _ = forward(x_GxTxD, a_RxD, b_RxF, core_G, jnp.broadcast_to(scale, slot_G.shape), y_GxTxF)
    return jnp.where(own_G[:, None, None], out_GxTxF, y_GxTxF)


def mix(core_N: jax.Array, h_NxRxT: jax.Array) -> jax.Array:
    """core(h), unrounded: [N, R, T]."""
    if core_N.ndim == 3:
        return _contract("nrt,nqr->nqt", h_NxRxT, core_N)
    wide = _accumulator(h_NxRxT.dtype)
    return h_NxRxT.astype(wide) * core_N.astype(h_NxRxT.dtype).astype(wide)[:, :, None]


def transposed(core_N: jax.Array) -> jax.Array:
    return core_N.swapaxes(-1, -2) if core_N.ndim == 3 else core_N


def owned(slot_M: jax.Array, slots: int) -> jax.Array:
    return (slot_M >= 0) & (slot_M < slots)


def live(shape: tuple[int, ...], rank_S: jax.Array) -> jax.Array:
    """bool, of the shape [S, R, R] or [S, R] of cores: which entries are within each one's rank."""
    live_SxR = jnp.arange(shape[1])[None] < rank_S[:, None]
    return live_SxR[:, :, None] & live_SxR[:, None] if len(shape) == 3 else live_SxR


def live_cores(core_S: jax.Array, rank_S: jax.Array, slot_M: jax.Array) -> jax.Array:
    """Each row's core, zero beyond its rank and where the slot is nobody's."""
    shape = (slot_M.shape[0], *core_S.shape[1:])
    # As flat rows: from a pool [S, R, R] a TPU would gather out of a copy that is padded to 128 lanes.
    core_M = take_slots(core_S.reshape(core_S.shape[0], -1), slot_M).reshape(shape)
    return jnp.where(live(shape, take_slots(rank_S, slot_M)), core_M, jnp.zeros((), core_S.dtype))


def _wide(scale_N: jax.Array) -> jax.Array:
    return scale_N[:, None, None].astype(jnp.promote_types(scale_N.dtype, jnp.float32))


def _accumulator(dtype) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _contract(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    dtype = left.dtype
    return jnp.einsum(subscripts, left, right.astype(dtype), preferred_element_type=_accumulator(dtype))
