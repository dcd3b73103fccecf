"""Bias: y' = y + b, the user's own at each site, whether the base has one there or not (BitFit, arXiv 2106.10199)."""

import jax
import jax.numpy as jnp

from popax.adapters.base import AdapterConfig
from popax.adapters.method import AdapterMethod, Leaves, NoOptions, SiteDims, along_last


def _init(key: jax.Array, dims: SiteDims, mask_R: jax.Array, config: AdapterConfig, options: NoOptions) -> Leaves:
    del key, mask_R, config, options
    return {"b": jnp.zeros(dims.d_out)}


def _delta(state: Leaves, shared: Leaves, scale: jax.Array, x: jax.Array, y: jax.Array, drop) -> jax.Array:
    del shared, x, drop
    return y + along_last(scale * state["b"].astype(jnp.float32), y)


def _merge(
    state: Leaves, shared: Leaves, scale: jax.Array, w_DxF: jax.Array, bias_F: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del shared
    return w_DxF, bias_F + scale * state["b"]


METHOD = AdapterMethod(
    name="bias",
    state_axes={"b": ("out",)},
    init=_init,
    delta=_delta,
    merge=_merge,
    norm=lambda state, shared, scale: jnp.abs(scale) * jnp.linalg.norm(state["b"]),
    shrink=lambda state, factor: {"b": state["b"] * factor},
    inits={"default": True},
    linear=True,
    learning_rate=1e-3,
    width=lambda rank, d_in, d_out: 1,
    scaled=False,
    drops=False,
    makes_bias=True,
)
