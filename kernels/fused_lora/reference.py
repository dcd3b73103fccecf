"""The op in plain XLA: x W, then the stacked op's own plain form. The oracle of the kernels, and the CPU path.

Shape letters: N population, T tokens, D in, F out, R rank. W is one matrix for all users.
"""

import jax
import jax.numpy as jnp

from popax.kernels.stacked_lora import reference as stacked


def product(x_NxTxD: jax.Array, w_DxF: jax.Array, w_scale_F: jax.Array | None = None) -> jax.Array:
    """(x W) * w_scale, in x's dtype; summed in float32 (float64 for float64)."""
    y_NxTxF = _contract("ntd,df->ntf", x_NxTxD, w_DxF)
    if w_scale_F is not None:
        y_NxTxF = y_NxTxF * w_scale_F[None, None, :].astype(y_NxTxF.dtype)
    return y_NxTxF.astype(x_NxTxD.dtype)


def input_gradient(g_NxTxF: jax.Array, w_DxF: jax.Array, w_scale_F: jax.Array | None = None) -> jax.Array:
    """(g * w_scale) W^T, in g's dtype."""
    return _contract("ntf,df->ntd", scaled(g_NxTxF, w_scale_F), w_DxF).astype(g_NxTxF.dtype)


def scaled(g_NxTxF: jax.Array, w_scale_F: jax.Array | None) -> jax.Array:
    """g * w_scale, in g's dtype: the scale is on the columns that the input's gradient sums over."""
    if w_scale_F is None:
        return g_NxTxF
    wide = _accumulator(g_NxTxF.dtype)
    return (g_NxTxF.astype(wide) * w_scale_F[None, None, :].astype(wide)).astype(g_NxTxF.dtype)


def forward(
    x_NxTxD: jax.Array,
    w_DxF: jax.Array,
    a_NxRxD: jax.Array,
    b_NxRxF: jax.Array,
    scale_N: jax.Array,
    w_scale_F: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """((x W) * w_scale + s h B, h_NxRxT = A x^T), both in x's dtype."""
    return stacked.forward(x_NxTxD, a_NxRxD, b_NxRxF, scale_N, product(x_NxTxD, w_DxF, w_scale_F))


def backward(
    g_NxTxF: jax.Array,
    x_NxTxD: jax.Array,
    h_NxRxT: jax.Array,
    w_DxF: jax.Array,
    a_NxRxD: jax.Array,
    b_NxRxF: jax.Array,
    scale_N: jax.Array,
    w_scale_F: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(dx, dA, dB, ds) for the cotangent g: dx = (g * w_scale) W^T + s (g B^T) A, the others the stacked op's."""
    g_NxTxF = g_NxTxF.astype(x_NxTxD.dtype)
    dx_NxTxD, da_NxRxD, db_NxRxF, ds_N = stacked.backward(g_NxTxF, x_NxTxD, h_NxRxT, a_NxRxD, b_NxRxF, scale_N)
    return input_gradient(g_NxTxF, w_DxF, w_scale_F) + dx_NxTxD, da_NxRxD, db_NxRxF, ds_N


def factor_gradients(
    g_NxTxF: jax.Array, x_NxTxD: jax.Array, h_NxRxT: jax.Array, gb_NxRxT: jax.Array, scale_N: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dA, dB, ds) in float32 from gb = B g^T: dA = s gb x, dB = s h g, ds = <h, gb>."""
    dtype, scale_Nx1x1 = x_NxTxD.dtype, scale_N[:, None, None].astype(jnp.float32)
    dh_NxRxT, scaled_NxRxT = ((each.astype(jnp.float32) * scale_Nx1x1).astype(dtype) for each in (gb_NxRxT, h_NxRxT))
    da_NxRxD = _contract("nrt,ntd->nrd", dh_NxRxT, x_NxTxD)
    db_NxRxF = _contract("nrt,ntf->nrf", scaled_NxRxT, g_NxTxF)
    return da_NxRxD, db_NxRxF, jnp.sum(gb_NxRxT.astype(jnp.float32) * h_NxRxT.astype(jnp.float32), axis=(1, 2))


def _contract(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    accumulate = _accumulator(left.dtype)
    return jnp.einsum(subscripts, left, right.astype(left.dtype), preferred_element_type=accumulate)


def _accumulator(dtype):
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
