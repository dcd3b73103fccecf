"""LoRA: delta = s (x A^T) B, A random, B zero (arXiv 2106.09685). Two factors a site are the user's."""

import math

import jax
import jax.numpy as jnp

from popax.adapters.base import AdapterConfig, AdapterMethod, IndexedSite, Leaves, SiteDims
from popax.adapters.lora_experts import EXPERTS
from popax.kernels.indexed_lora import indexed_lora_sites
from popax.kernels.stacked_lora import lora


def _shared(dims: SiteDims, mask_R: jax.Array, w_DxF: jax.Array) -> Leaves:
    del dims, mask_R, w_DxF
    return {}


def _init(key: jax.Array, dims: SiteDims, mask_R: jax.Array, config: AdapterConfig) -> Leaves:
    """B = 0; A ~ U(-1/sqrt(D), 1/sqrt(D)) ("default") or N(0, 1/r^2) with the layer's own rank r ("gaussian").

    Both are PEFT's: its default is kaiming-uniform with a = sqrt 5, which is that bound.
    """
    # At experts, the factor on their own side is one for each; the one on the hidden side is all experts' of the user.
    experts = {side: (dims.experts,) if dims.hidden_side not in (None, side) else () for side in ("in", "out")}
    shape = (*experts["in"], dims.rank, dims.d_in)
    if config.init == "gaussian":
        a = jax.random.normal(key, shape) / jnp.maximum(jnp.sum(mask_R), 1.0)
    else:
        bound = 1.0 / math.sqrt(dims.d_in)
        a = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
    # Rows beyond the layer's rank start at zero in both factors; each factor's gradient is then zero there for good.
    mask = mask_R.reshape((1,) * (len(shape) - 2) + (-1, 1))
    return {"a": a * mask, "b": jnp.zeros((*experts["out"], dims.rank, dims.d_out))}


def _delta(state: Leaves, shared: Leaves, scale: jax.Array, x: jax.Array, y: jax.Array, drop) -> jax.Array:
    del shared
    return lora(drop(x), state["a"], state["b"], scale, y)


def _indexed(sites: tuple[IndexedSite, ...], x_BxTxD: jax.Array, slot_B: jax.Array) -> tuple[jax.Array, ...]:
    factors = tuple((site.state["a"], site.state["b"], site.y_BxTxF) for site in sites)
    return indexed_lora_sites(x_BxTxD, factors, tuple(site.scale for site in sites), slot_B)


def _factors(state: Leaves, shared: Leaves) -> tuple[jax.Array, jax.Array]:
    del shared
    return state["a"], state["b"]


METHOD = AdapterMethod(
    name="lora",
    state_axes={"a": ("rank", "in"), "b": ("rank", "out")},
    shared_axes={},
    shared=_shared,
    init=_init,
    delta=_delta,
    indexed=_indexed,
    factors=_factors,
    inits={"default": True, "gaussian": True},
    linear=False,
    experts=EXPERTS,
)
