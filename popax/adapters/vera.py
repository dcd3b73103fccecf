"""VeRA: delta = ((x A^T) * d B) * b; A and B are random and shared by all users, sites and layers (arXiv 2310.11454).

A user owns two vectors of each site: d [R] and b [F]. A site's A and B are cut from one matrix each, as PEFT does.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from popax.adapters.base import AdapterConfig
from popax.adapters.method import AdapterMethod, Leaves, SiteBase, SiteDims, along_last
from popax.errors import ConfigError
from popax.kernels.shared_core import shared_core


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """d_initial: where d starts (the paper's 0.1). seed: of A and B."""

    d_initial: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if not (math.isfinite(self.d_initial) and self.d_initial):
            raise ConfigError(f"d_initial={self.d_initial}: a finite number other than 0, or b could never learn")


def _shared(dims: SiteDims, mask_R: jax.Array, base: SiteBase, options: Options) -> Leaves:
    """Kaiming-uniform (gain sqrt 2, PEFT's) over the matrices that all sites are cut from."""
    del base
    a_key, b_key = jax.random.split(jax.random.key(options.seed))
    a = _uniform(a_key, (dims.rank, dims.widest_in), dims.widest_in)[:, : dims.d_in]
    b = _uniform(b_key, (dims.rank, dims.widest_out), dims.rank)[:, : dims.d_out]
    return {"a": a * mask_R[:, None], "b": b * mask_R[:, None]}


def _uniform(key: jax.Array, shape: tuple[int, int], fan_in: int) -> jax.Array:
    bound = math.sqrt(6 / fan_in)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _init(key: jax.Array, dims: SiteDims, mask_R: jax.Array, config: AdapterConfig, options: Options) -> Leaves:
    del key, config
    return {"d": options.d_initial * mask_R, "b": jnp.zeros(dims.d_out)}


def _delta(state: Leaves, shared: Leaves, scale: jax.Array, x: jax.Array, y: jax.Array, drop) -> jax.Array:
    update = shared_core(drop(x), shared["a"], shared["b"], state["d"], scale)
    return y + update.astype(y.dtype) * along_last(state["b"], y)


def _factors(state: Leaves, shared: Leaves) -> tuple[jax.Array, jax.Array]:
    return shared["a"] * state["d"][:, None], shared["b"] * state["b"][None]


METHOD = AdapterMethod(
    name="vera",
    state_axes={"d": ("rank",), "b": ("out",)},
    shared_axes={"a": ("rank", "in"), "b": ("rank", "out")},
    shared=_shared,
    init=_init,
    delta=_delta,
    factors=_factors,
    shrink=lambda state, factor: state | {"b": state["b"] * factor},
    inits={"default": True},
    linear=False,
    learning_rate=4e-3,
    scaled=False,
    options=Options,
)
