"""LoRA-XS: delta = s (x A^T) C^T B; A, B from the base's truncated SVD, shared by all users (arXiv 2405.17604).

A user owns the r x r core C of each site and nothing else, and the output is linear in it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from popax.adapters import svd
from popax.adapters.base import AdapterConfig
from popax.adapters.method import AdapterMethod, IndexedSite, Leaves, SiteBase, SiteDims
from popax.kernels.shared_core import indexed_shared_core, shared_core

GAUSSIAN_STD = 1e-5  # the paper's start, section 3


def singular_basis(dims: SiteDims, mask_R: jax.Array, base: SiteBase, options: Any) -> Leaves:
    """W = U S V^T, truncated: a = U_r^T, b = S_r V_r^T."""
    del dims, options
    spectrum = svd.largest(base.w_DxF, mask_R)
    return {"a": spectrum.u_RxD, "b": spectrum.s_R[:, None] * spectrum.v_RxF}


def _init(key: jax.Array, dims: SiteDims, mask_R: jax.Array, config: AdapterConfig, options: Any) -> Leaves:
    """C = 0 ("default": exactly the base) or C ~ N(0, 1e-5^2) ("gaussian", the paper's)."""
    shape = (dims.rank, dims.rank)
    if config.init == "gaussian":
        return {"core": jax.random.normal(key, shape) * GAUSSIAN_STD * mask_R[:, None] * mask_R[None, :]}
    return {"core": jnp.zeros(shape)}


def _delta(state: Leaves, shared: Leaves, scale: jax.Array, x: jax.Array, y: jax.Array, drop) -> jax.Array:
    return shared_core(drop(x), shared["a"], shared["b"], state["core"], scale, y)


def _indexed(sites: tuple[IndexedSite, ...], x_BxTxD: jax.Array, slot_B: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(_indexed_site(site, x_BxTxD, slot_B) for site in sites)


def _indexed_site(site: IndexedSite, x_BxTxD: jax.Array, slot_B: jax.Array) -> jax.Array:
    basis = (site.shared["a"], site.shared["b"])
    return indexed_shared_core(x_BxTxD, *basis, site.state["core"], site.scale, slot_B, site.y_BxTxF)


def _factors(state: Leaves, shared: Leaves) -> tuple[jax.Array, jax.Array]:
    return shared["a"], state["core"].T @ shared["b"]


METHOD = AdapterMethod(
    name="lora_xs",
    state_axes={"core": ("rank", "rank")},
    shared_axes={"a": ("rank", "in"), "b": ("rank", "out")},
    shared=singular_basis,
    init=_init,
    delta=_delta,
    indexed=_indexed,
    factors=_factors,
    shrink=lambda state, factor: {"core": state["core"] * factor},
    inits={"default": True, "gaussian": False},
    linear=True,
    learning_rate=4e-3,
)
