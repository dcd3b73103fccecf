"""The op in plain XLA: the oracle of every other implementation, and the CPU path.

Shape letters: N population, T tokens, D in, F out, R rank. Products accumulate in float32 whatever the inputs are.
"""

import jax
import jax.numpy as jnp


def _contract(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    dtype = left.dtype
    accumulate = jnp.float64 if dtype == jnp.float64 else jnp.float32
    return jnp.einsum(subscripts, left, right.astype(dtype), preferred_element_type=accumulate)


def forward(
    x_NxTxD: jax.Array, a_NxRxD: jax.Array, b_NxRxF: jax.Array, scale_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(delta_NxTxF, h_NxTxR): h = x A^T, delta = s h B, both in x's dtype."""
    h_NxTxR = _contract("ntd,nrd->ntr", x_NxTxD, a_NxRxD)
    scaled_NxTxR = (h_NxTxR * scale_N[:, None, None].astype(h_NxTxR.dtype)).astype(x_NxTxD.dtype)
    delta_NxTxF = _contract("ntr,nrf->ntf", scaled_NxTxR, b_NxRxF)
    return delta_NxTxF.astype(x_NxTxD.dtype), h_NxTxR.astype(x_NxTxD.dtype)


def backward(
    g_NxTxF: jax.Array,
    x_NxTxD: jax.Array,
    h_NxTxR: jax.Array,
    a_NxRxD: jax.Array,
    b_NxRxF: jax.Array,
    scale_N: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(dx, dA, dB, ds) for the cotangent g of delta.

    dh = s g B^T, dx = dh A, dA = dh^T x, dB = s h^T g, ds = <h, g B^T>. dx is in x's dtype, the others in their
    operand's.
    """
    gb_NxTxR = _contract("ntf,nrf->ntr", g_NxTxF, b_NxRxF)
    scale_Nx1x1 = scale_N[:, None, None].astype(gb_NxTxR.dtype)
    dh_NxTxR = (gb_NxTxR * scale_Nx1x1).astype(x_NxTxD.dtype)
    scaled_NxTxR = (h_NxTxR.astype(gb_NxTxR.dtype) * scale_Nx1x1).astype(x_NxTxD.dtype)
    dx_NxTxD = _contract("ntr,nrd->ntd", dh_NxTxR, a_NxRxD).astype(x_NxTxD.dtype)
    da_NxRxD = _contract("ntr,ntd->nrd", dh_NxTxR, x_NxTxD).astype(a_NxRxD.dtype)
    db_NxRxF = _contract("ntr,ntf->nrf", scaled_NxTxR, g_NxTxF.astype(x_NxTxD.dtype)).astype(b_NxRxF.dtype)
    dscale_N = jnp.sum(gb_NxTxR * h_NxTxR.astype(gb_NxTxR.dtype), axis=(1, 2)).astype(scale_N.dtype)
    return dx_NxTxD, da_NxRxD, db_NxRxF, dscale_N
