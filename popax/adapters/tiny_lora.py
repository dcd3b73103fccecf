"""TinyLoRA: delta = x U (sum_i v_i P_i)^T S V^T; U S V^T from the base's truncated SVD, P seeded (arXiv 2602.04118).

A user owns the vectors v, one for each group of sites: with one group, `projections` numbers for a whole model. The
singular values stand on the output's side whole, as in the paper; PEFT splits their root over both sides, which is the
same map only where they are equal.
"""

import dataclasses

import jax
import jax.numpy as jnp

from popax.adapters.base import AdapterConfig
from popax.adapters.lora_xs import singular_basis
from popax.adapters.method import AdapterMethod, Leaves, SiteBase, SiteDims
from popax.errors import ConfigError
from popax.kernels.shared_core import shared_core


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """projections: numbers in a vector. groups: of sites that share one, in the order of depth. seed: of the P."""

    projections: int = 13
    groups: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.projections < 1 or self.groups < 1:
            raise ConfigError(f"projections={self.projections}, groups={self.groups}: each is at least 1")


def _shared(dims: SiteDims, mask_R: jax.Array, base: SiteBase, options: Options) -> Leaves:
    """The basis of `lora_xs`, and P_i ~ N(0, 1/r), each site's and layer's own."""
    shape = (options.projections, dims.rank, dims.rank)
    p = jax.random.normal(jax.random.fold_in(base.key, options.seed), shape)
    p = p / jnp.sqrt(jnp.maximum(jnp.sum(mask_R), 1.0)) * (mask_R[:, None] * mask_R[None])[None]
    return singular_basis(dims, mask_R, base, options) | {"p": p}


def _init(key: jax.Array, config: AdapterConfig, options: Options) -> Leaves:
    del key, config
    return {"v": jnp.zeros((options.groups, options.projections))}


def _core(state: Leaves, shared: Leaves) -> jax.Array:
    return jnp.einsum("p,pqr->qr", state["v"].astype(shared["p"].dtype), shared["p"])


def _delta(state: Leaves, shared: Leaves, scale: jax.Array, x: jax.Array, y: jax.Array, drop) -> jax.Array:
    return shared_core(drop(x), shared["a"], shared["b"], _core(state, shared), scale, y)


def _factors(state: Leaves, shared: Leaves) -> tuple[jax.Array, jax.Array]:
    return shared["a"], _core(state, shared).T @ shared["b"]


METHOD = AdapterMethod(
    name="tiny_lora",
    state_axes={"v": ("groups", "vector")},
    shared_axes={"a": ("rank", "in"), "b": ("rank", "out"), "p": ("vector", "rank", "rank")},
    shared=_shared,
    init=_init,
    delta=_delta,
    factors=_factors,
    shrink=lambda state, factor: {"v": state["v"] * factor},
    inits={"default": True},
    linear=True,
    learning_rate=1e-2,
    scaled=False,
    tied=True,
    options=Options,
)
