"""MiCA: LoRA with B fixed at W's smallest left singular vectors (those of its output), A zero; only A is trained.

All users share B, nothing is subtracted from the base, and the delta is linear in what a user owns.
"""

from typing import Any

import jax
import jax.numpy as jnp

from popax.adapters import svd
from popax.adapters.base import AdapterConfig
from popax.adapters.method import AdapterMethod, Leaves, SiteBase, SiteDims


def _shared(dims: SiteDims, mask_R: jax.Array, base: SiteBase, options: Any) -> Leaves:
    del dims, options
    return {"b": svd.smallest(base.w_DxF, mask_R).v_RxF}


def _init(key: jax.Array, dims: SiteDims, mask_R: jax.Array, config: AdapterConfig, options: Any) -> Leaves:
    del key, mask_R, config, options
    return {"a": jnp.zeros((dims.rank, dims.d_in))}


def _delta(state: Leaves, shared: Leaves, scale: jax.Array, x: jax.Array, y: jax.Array, drop) -> jax.Array:
    # Not the LoRA kernel: it would give every user a copy of B, and B a gradient.
    low = _product("...d,rd->...r", drop(x), state["a"])
    update = _product("...r,rf->...f", (scale * low).astype(x.dtype), shared["b"])
    return y + update.astype(y.dtype)


def _product(subscripts: str, x: jax.Array, factor: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, factor.astype(x.dtype), preferred_element_type=jnp.float32)


METHOD = AdapterMethod(
    name="lora",
    state_axes={"a": ("rank", "in")},
    shared_axes={"b": ("rank", "out")},
    shared=_shared,
    init=_init,
    delta=_delta,
    factors=lambda state, shared: (state["a"], shared["b"]),
    shrink=lambda state, factor: {"a": state["a"] * factor},
    inits={"mica": True},
    linear=True,
    learning_rate=1e-3,
)
