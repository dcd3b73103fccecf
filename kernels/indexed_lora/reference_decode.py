"""Decode in plain XLA: gather each token's factors, then batched products. The oracle and the CPU path.

A site is (a_SxRxD, b_SxRxF, y_TxF or None); sites share x, as q, k and v do.
"""

import jax
import jax.numpy as jnp

from popax.kernels.indexed_lora.slots import take_slots

Site = tuple[jax.Array, jax.Array, jax.Array | None]


def decode(
    x_TxD: jax.Array,
    sites: tuple[Site, ...],
    scale: tuple[jax.Array, ...],
    slot_T: jax.Array,
    rank_S: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """out_t = y_t + s[slot_t] (x_t A[slot_t]^T) B[slot_t] for every site; y's bytes where the slot is nobody's.

    x: [T, D]; scale: float32 [S] a site; slot: int [T], -1 or out of range for none; rank: int [S], rows beyond it
    count as absent. Returns [T, F] a site, in y's dtype, or x's without y.
    """
    return tuple(_site(x_TxD, *site, scale_S, slot_T, rank_S) for site, scale_S in zip(sites, scale, strict=True))


def _site(x_TxD, a_SxRxD, b_SxRxF, y_TxF, scale_S, slot_T, rank_S):
    slots, rank, _ = a_SxRxD.shape
    a_TxRxD, b_TxRxF = (take_slots(factor, slot_T).astype(x_TxD.dtype) for factor in (a_SxRxD, b_SxRxF))
    if rank_S is not None:
        live_TxR = jnp.arange(rank)[None, :] < take_slots(rank_S, slot_T)[:, None]
        zero = jnp.zeros((), x_TxD.dtype)
        a_TxRxD, b_TxRxF = (jnp.where(live_TxR[..., None], factor, zero) for factor in (a_TxRxD, b_TxRxF))
    accumulate = jnp.float64 if x_TxD.dtype == jnp.float64 else jnp.float32
    h_TxR = jnp.einsum("td,trd->tr", x_TxD, a_TxRxD, preferred_element_type=accumulate)
    scaled_TxR = (h_TxR * take_slots(scale_S, slot_T)[:, None].astype(accumulate)).astype(x_TxD.dtype)
    delta_TxF = jnp.einsum("tr,trf->tf", scaled_TxR, b_TxRxF, preferred_element_type=accumulate)
    if y_TxF is None:
        return delta_TxF.astype(x_TxD.dtype)
    own_T = (slot_T >= 0) & (slot_T < slots)
    return jnp.where(own_T[:, None], y_TxF + delta_TxF.astype(y_TxF.dtype), y_TxF)
