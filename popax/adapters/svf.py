"""SVF: W' = U diag(s (1 + z)) V^T; every singular value of the base has a factor of the user's (arXiv 2501.06252).

A user owns z [min(D, F)] of each site, zero at the start; the base's decomposition is shared. With `renormalise` the
values are scaled back to their sum, sum(s) / sum(s (1 + z)), after which the delta is no longer linear in z.
"""

import dataclasses

import jax
import jax.numpy as jnp

from popax.adapters import svd
from popax.adapters.base import AdapterConfig
from popax.adapters.method import AdapterMethod, IndexedSite, Leaves, SiteBase, SiteDims
from popax.kernels.shared_core import indexed_shared_core, shared_core


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """renormalise: keep the sum of the singular values."""

    renormalise: bool = False


def _shared(dims: SiteDims, mask_R: jax.Array, base: SiteBase, options: Options) -> Leaves:
    del dims, options
    spectrum = svd.largest(base.w_DxF, mask_R)
    return {"a": spectrum.u_RxD, "b": spectrum.s_R[:, None] * spectrum.v_RxF, "s": spectrum.s_R}


def _init(key: jax.Array, dims: SiteDims, mask_R: jax.Array, config: AdapterConfig, options: Options) -> Leaves:
    del key, mask_R, config, options
    return {"z": jnp.zeros(dims.rank)}


def _plain(state: Leaves, shared: Leaves) -> jax.Array:
    del shared
    return state["z"]


def _renormalised(state: Leaves, shared: Leaves) -> jax.Array:
    """z' with s (1 + z') = s (1 + z) sum(s) / sum(s (1 + z)); exactly 0 where z is."""
    s_R, z_R = shared["s"], state["z"].astype(shared["s"].dtype)
    gain = jnp.sum(s_R * z_R) / jnp.maximum(jnp.sum(s_R), jnp.finfo(s_R.dtype).tiny)
    return (z_R - gain) / (1.0 + gain)


def _method(offset, *, linear: bool) -> AdapterMethod:
    def delta(state: Leaves, shared: Leaves, scale: jax.Array, x: jax.Array, y: jax.Array, drop) -> jax.Array:
        return shared_core(drop(x), shared["a"], shared["b"], offset(state, shared), scale, y)

    def indexed(sites: tuple[IndexedSite, ...], x_BxTxD: jax.Array, slot_B: jax.Array) -> tuple[jax.Array, ...]:
        def at(site: IndexedSite) -> jax.Array:
            z_S = jax.vmap(lambda state: offset(state, site.shared))(site.state)
            return indexed_shared_core(
                x_BxTxD, site.shared["a"], site.shared["b"], z_S, site.scale, slot_B, site.y_BxTxF
            )

        return tuple(map(at, sites))

    return AdapterMethod(
        name="svf",
        state_axes={"z": ("rank",)},
        shared_axes={"a": ("rank", "in"), "b": ("rank", "out"), "s": ("rank",)},
        shared=_shared,
        init=_init,
        delta=delta,
        indexed=indexed,
        factors=lambda state, shared: (shared["a"], offset(state, shared)[:, None] * shared["b"]),
        # ||s z||: u and v have orthonormal rows.
        norm=lambda state, shared, scale: jnp.abs(scale) * jnp.linalg.norm(shared["s"] * offset(state, shared)),
        shrink=(lambda state, factor: {"z": state["z"] * factor}) if linear else None,
        inits={"default": True},
        linear=linear,
        learning_rate=2e-3,
        width=lambda rank, d_in, d_out: min(d_in, d_out),
        scaled=False,
        options=Options,
        variant=_variant,
    )


def _variant(config: AdapterConfig) -> AdapterMethod:
    return RENORMALISED if dict(config.options).get("renormalise") else METHOD


METHOD = _method(_plain, linear=True)
RENORMALISED = _method(_renormalised, linear=False)
