"""Singular values and vectors of a base weight, W = U S V^T in popax's orientation (y = x W, W [D, F])."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Spectrum(NamedTuple):
    """Some of W's singular triplets as rows: u [R, D] on the side of the input, s [R], v [R, F] on the output's."""

    u_RxD: jax.Array
    s_R: jax.Array
    v_RxF: jax.Array


def largest(w_DxF: jax.Array, mask_R: jax.Array) -> Spectrum:
    """The triplets of the largest singular values, in falling order; zero where the mask is.

    Each row of u has its largest entry positive: a decomposition leaves signs open, and what users own is for one of
    them.
    """
    return _signed(_decomposed(w_DxF), slice(0, mask_R.shape[0]), mask_R)


def smallest(w_DxF: jax.Array, mask_R: jax.Array) -> Spectrum:
    """The triplets of the smallest of W's min(D, F) singular values, in rising order; signs and mask as `largest`."""
    return _signed(jax.tree.map(lambda leaf: leaf[::-1], _decomposed(w_DxF)), slice(0, mask_R.shape[0]), mask_R)


def _decomposed(w_DxF: jax.Array) -> Spectrum:
    u_DxK, s_K, vt_KxF = jnp.linalg.svd(w_DxF.astype(jnp.float32), full_matrices=False)
    return Spectrum(u_DxK.T, s_K, vt_KxF)


def _signed(whole: Spectrum, rows: slice, mask_R: jax.Array) -> Spectrum:
    u_RxD, s_R, v_RxF = jax.tree.map(lambda leaf: leaf[rows], whole)
    peak_Rx1 = jnp.take_along_axis(u_RxD, jnp.argmax(jnp.abs(u_RxD), axis=1)[:, None], axis=1)
    sign_Rx1 = jnp.where(peak_Rx1 < 0, -1.0, 1.0) * mask_R[:, None]
    return Spectrum(u_RxD * sign_Rx1, s_R * mask_R, v_RxF * sign_Rx1)
