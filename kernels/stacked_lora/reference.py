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
    x_NxTxD: jax.Array,
    a_NxRxD: jax.Array,
    b_NxRxF: jax.Array,
    scale_N: jax.Array,
    y_NxTxF: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(y + s h B, h_NxRxT = A x^T): the first in y's dtype, in x's where there is no y; h in x's."""
    h_NxRxT = _contract("ntd,nrd->nrt", x_NxTxD, a_NxRxD)
    scaled_NxRxT = (h_NxRxT * scale_N[:, None, None].astype(h_NxRxT.dtype)).astype(x_NxTxD.dtype)
    delta_NxTxF = _contract("nrt,nrf->ntf", scaled_NxRxT, b_NxRxF).astype(x_NxTxD.dtype)
    out_NxTxF = delta_NxTxF if y_NxTxF is None else y_NxTxF + delta_NxTxF.astype(y_NxTxF.dtype)
    return out_NxTxF, h_NxRxT.astype(x_NxTxD.dtype)


def backward(
    g_NxTxF: jax.Array,
    x_NxTxD: jax.Array,
    h_NxRxT: jax.Array,
    a_NxRxD: jax.Array,
    b_NxRxF: jax.Array,
    scale_N: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(dx, dA, dB, ds) for the cotangent g of the output; y's is g itself.

    dh = s B g^T, dx = dh^T A, dA = dh x, dB = s h g, ds = <h, B g^T>. dx is in x's dtype, the others in their
    operand's.
    """
    g_NxTxF = g_NxTxF.astype(x_NxTxD.dtype)
    gb_NxRxT = _contract("ntf,nrf->nrt", g_NxTxF, b_NxRxF)
    scale_Nx1x1 = scale_N[:, None, None].astype(gb_NxRxT.dtype)
    dh_NxRxT = (gb_NxRxT * scale_Nx1x1).astype(x_NxTxD.dtype)
    scaled_NxRxT = (h_NxRxT.astype(gb_NxRxT.dtype) * scale_Nx1x1).astype(x_NxTxD.dtype)
    dx_NxTxD = _contract("nrt,nrd->ntd", dh_NxRxT, a_NxRxD).astype(x_NxTxD.dtype)
    da_NxRxD = _contract("nrt,ntd->nrd", dh_NxRxT, x_NxTxD).astype(a_NxRxD.dtype)
    db_NxRxF = _contract("nrt,ntf->nrf", scaled_NxRxT, g_NxTxF).astype(b_NxRxF.dtype)
    dscale_N = jnp.sum(gb_NxRxT * h_NxRxT.astype(gb_NxRxT.dtype), axis=(1, 2)).astype(scale_N.dtype)
    return dx_NxTxD, da_NxRxD, db_NxRxF, dscale_N
