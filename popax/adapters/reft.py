"""LoReFT: h' = h + R^T (W h + b - R h) on what a block hands on, R with orthonormal rows (arXiv 2404.03592, eq. 4).

A user owns R [r, D], W and b [r] of each block. W is kept as its difference from R, so that h' = h + R^T (w h + b) and
a fresh adapter is the base; after each step R's rows are made orthonormal again. No weight of the base changes.
"""

import dataclasses

import jax
import jax.numpy as jnp

from popax.adapters.base import AdapterConfig
from popax.adapters.method import AdapterMethod, Leaves, SiteDims, along_last
from popax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """first: how many of a text's first tokens it acts on; 0 is all of them."""

    first: int = 0

    def __post_init__(self):
        if self.first < 0:
            raise ConfigError(f"first={self.first}: a number of tokens, or 0 for all")


def _init(key: jax.Array, dims: SiteDims, mask_R: jax.Array, config: AdapterConfig, options: Options) -> Leaves:
    """w = 0, b = 0; R orthonormal rows of a random span."""
    del config, options
    r_RxD = _orthonormal(jax.random.normal(key, (dims.rank, dims.d_in))) * mask_R[:, None]
    return {"r": r_RxD, "w": jnp.zeros((dims.rank, dims.d_in)), "b": jnp.zeros(dims.rank)}


def _orthonormal(rows_RxD: jax.Array) -> jax.Array:
    """The Q of a QR decomposition whose triangle has a positive diagonal: orthonormal rows stay as they are."""
    q_DxR, r_RxR = jnp.linalg.qr(rows_RxD.T)
    return (q_DxR * jnp.where(jnp.diagonal(r_RxR) < 0, -1.0, 1.0)[None]).T


def _refresh(state: Leaves, shared: Leaves, scale: jax.Array, w_DxF: None) -> Leaves:
    del shared, scale, w_DxF
    r_RxD = state["r"].astype(jnp.float32)
    live_Rx1 = jnp.any(r_RxD != 0, axis=1, keepdims=True)  # rows beyond a layer's rank are zero and stay zero
    return state | {"r": jnp.where(live_Rx1, _orthonormal(r_RxD), 0.0).astype(state["r"].dtype)}


def _delta(state: Leaves, shared: Leaves, scale: jax.Array, x: jax.Array, y: jax.Array, drop) -> jax.Array:
    del shared
    r_RxD, w_RxD = state["r"].astype(x.dtype), state["w"].astype(x.dtype)
    low = jnp.einsum("...d,rd->...r", drop(x), w_RxD, preferred_element_type=jnp.float32)
    low = scale * (low + along_last(state["b"], low))
    update = jnp.einsum("...r,rd->...d", low.astype(x.dtype), r_RxD, preferred_element_type=jnp.float32)
    return y + update.astype(y.dtype)


def _norm(state: Leaves, shared: Leaves, scale: jax.Array) -> jax.Array:
    """||(w, b)||_F, which R^T leaves as it is."""
    del shared
    return jnp.abs(scale) * jnp.sqrt(jnp.sum(jnp.square(state["w"])) + jnp.sum(jnp.square(state["b"])))


METHOD = AdapterMethod(
    name="reft",
    state_axes={"r": ("rank", "in"), "w": ("rank", "in"), "b": ("rank",)},
    init=_init,
    delta=_delta,
    norm=_norm,
    shrink=lambda state, factor: state | {"w": state["w"] * factor, "b": state["b"] * factor},
    refresh=_refresh,
    inits={"default": True},
    linear=False,
    learning_rate=1e-3,
    scaled=False,
    kind="hidden",
    options=Options,
    acts=lambda options, positions: (positions >= 0) & ((positions < options.first) | (options.first == 0)),
)
