"""LoRA that starts at factors A0, B0 of the base's own weight, without a byte of the base rewritten.

Elsewhere such a start subtracts s A0^T B0 from W, so that the output is the base's. A0 and B0 depend on W alone, and
here all users share them: a user owns the differences a = A - A0 and b = B - B0, zero at first, and

    delta = s x (A^T B - A0^T B0) = s x (a^T (B0 + b) + A0^T b),

which is exactly zero at the start, and whose gradients in a and b are those in A and B.
"""

from typing import Any

import jax
import jax.numpy as jnp

from popax.adapters import svd
from popax.adapters.base import AdapterConfig
from popax.adapters.method import AdapterMethod, Leaves, SiteBase, SiteDims
from popax.kernels.stacked_lora import lora


def _pissa(base: SiteBase, mask_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest triplets, sqrt(S / s) on each factor (arXiv 2404.02948)."""
    return _rooted(svd.largest(base.w_DxF, mask_R), base.scale)


def _milora(base: SiteBase, mask_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The smallest triplets, sqrt(S / s) on each factor (arXiv 2406.09044)."""
    return _rooted(svd.smallest(base.w_DxF, mask_R), base.scale)


def _rooted(spectrum: svd.Spectrum, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    root_Rx1 = jnp.sqrt(spectrum.s_R / jnp.where(scale > 0, scale, 1.0))[:, None]
    return spectrum.u_RxD * root_Rx1, spectrum.v_RxF * root_Rx1


def _olora(base: SiteBase, mask_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """W^T = Q R: B0 the first columns of Q, A0 the first rows of R (arXiv 2406.01775)."""
    q_FxK, r_KxD = jnp.linalg.qr(base.w_DxF.astype(jnp.float32).T)
    rank = mask_R.shape[0]
    return r_KxD[:rank] * mask_R[:, None], q_FxK.T[:rank] * mask_R[:, None]


def _olora_tail(base: SiteBase, mask_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The smallest singular vectors, without their values."""
    spectrum = svd.smallest(base.w_DxF, mask_R)
    return spectrum.u_RxD, spectrum.v_RxF


_STARTS = {"pissa": _pissa, "milora": _milora, "olora": _olora, "olora_tail": _olora_tail}


def _method(start: str) -> AdapterMethod:
    def shared(dims: SiteDims, mask_R: jax.Array, base: SiteBase, options: Any) -> Leaves:
        del dims, options
        a, b = _STARTS[start](base, mask_R)
        return {"a": a, "b": b}

    return AdapterMethod(
        name="lora",
        state_axes={"a": ("rank", "in"), "b": ("rank", "out")},
        shared_axes={"a": ("rank", "in"), "b": ("rank", "out")},
        shared=shared,
        init=_init,
        delta=_delta,
        factors=_factors,
        inits={start: True},
        linear=False,
        learning_rate=1e-3,
    )


def _init(key: jax.Array, dims: SiteDims, mask_R: jax.Array, config: AdapterConfig, options: Any) -> Leaves:
    del key, mask_R, config, options
    return {"a": jnp.zeros((dims.rank, dims.d_in)), "b": jnp.zeros((dims.rank, dims.d_out))}


def _factors(state: Leaves, shared: Leaves) -> tuple[jax.Array, jax.Array]:
    """[a; A0] and [B0 + b; b], of twice the rank, in the shared arrays' own dtype: b may be far below B0."""
    a, b = (state[name].astype(shared[name].dtype) for name in ("a", "b"))
    return jnp.concatenate((a, shared["a"]), axis=-2), jnp.concatenate((shared["b"] + b, b), axis=-2)


def _delta(state: Leaves, shared: Leaves, scale: jax.Array, x: jax.Array, y: jax.Array, drop) -> jax.Array:
    return lora(drop(x), *_factors(state, shared), scale, y)


METHODS = {start: _method(start) for start in _STARTS}
