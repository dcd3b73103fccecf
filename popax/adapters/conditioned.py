"""Conditioned: the core of LoRA-XS is a small shared network's answer to a user's trait vector (after PsychAdapter,
arXiv 2412.16882): C = sum_h tanh(W1 t)_h W2_h.

A user owns the traits t, one vector for the whole model, zero at first, where the output is the base's. W1 is seeded
and the same everywhere; each site and layer has its own W2, seeded until `fitted` sets it from users whose cores are
known: then traits alone, of a user without any text, give an adapter (a cold start), and training goes on from there.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from popax.adapters.base import AdapterConfig
from popax.adapters.lora_xs import singular_basis
from popax.adapters.method import TIED, AdapterMethod, Leaves, SiteBase, SiteDims
from popax.errors import ConfigError
from popax.kernels.shared_core import shared_core
from popax.types import AdapterState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """traits: numbers a user owns. hidden: features of the network. seed: of its weights."""

    traits: int = 16
    hidden: int = 64
    seed: int = 0

    def __post_init__(self):
        if self.traits < 1 or self.hidden < 1:
            raise ConfigError(f"traits={self.traits}, hidden={self.hidden}: each is at least 1")

    @property
    def groups(self) -> int:
        """One vector for all sites."""
        return 1


def _shared(dims: SiteDims, mask_R: jax.Array, base: SiteBase, options: Options) -> Leaves:
    """The basis of `lora_xs`; W1 ~ N(0, 1/K), W2 ~ N(0, 1/(H r))."""
    first = jax.random.normal(jax.random.key(options.seed), (options.hidden, options.traits))
    second = jax.random.normal(jax.random.fold_in(base.key, options.seed), (options.hidden, dims.rank, dims.rank))
    live_RxR = mask_R[:, None] * mask_R[None]
    return singular_basis(dims, mask_R, base, options) | {
        "w1": first / math.sqrt(options.traits),
        "w2": second / math.sqrt(options.hidden * dims.rank) * live_RxR[None],
    }


def _init(key: jax.Array, config: AdapterConfig, options: Options) -> Leaves:
    del key, config
    return {"traits": jnp.zeros((1, options.traits))}


def _core(state: Leaves, shared: Leaves) -> jax.Array:
    return jnp.einsum("h,hqr->qr", features(state["traits"], shared["w1"]), shared["w2"])


def features(traits_K: jax.Array, w1_HxK: jax.Array) -> jax.Array:
    """tanh(W1 t), [H]."""
    return jnp.tanh(jnp.einsum("hk,k->h", w1_HxK, traits_K.astype(w1_HxK.dtype)))


def _delta(state: Leaves, shared: Leaves, scale: jax.Array, x: jax.Array, y: jax.Array, drop) -> jax.Array:
    return shared_core(drop(x), shared["a"], shared["b"], _core(state, shared), scale, y)


def _factors(state: Leaves, shared: Leaves) -> tuple[jax.Array, jax.Array]:
    return shared["a"], _core(state, shared).T @ shared["b"]


def fitted(
    shared: AdapterState, adapters_N: AdapterState, cores_N: AdapterState, *, ridge: float = 1e-3
) -> AdapterState:
    """shared, with each W2 the one that best maps these users' traits to these cores of `lora_xs` adapters.

    Least squares in closed form, min ||tanh(T W1^T) W2 - C||^2 + ridge N ||W2||^2, a site and layer at a time.
    adapters_N: of this method, whose traits are known; cores_N: of the same users, sites, ranks and scale. Users' cores
    thus reach everybody's adapters: it is a training set, and belongs in the provenance of what is made with it.
    """
    traits_NxK = adapters_N[TIED]["traits"][:, 0].astype(jnp.float32)

    def at(w1_HxK: jax.Array, core_NxRxR: jax.Array) -> jax.Array:
        h_NxH = jax.vmap(lambda traits: features(traits, w1_HxK))(traits_NxK)
        gram_HxH = h_NxH.T @ h_NxH + ridge * h_NxH.shape[0] * jnp.eye(h_NxH.shape[1])
        flat_NxC = core_NxRxR.reshape(core_NxRxR.shape[0], -1).astype(jnp.float32)
        return jnp.linalg.solve(gram_HxH, h_NxH.T @ flat_NxC).reshape(-1, *core_NxRxR.shape[1:])

    def at_site(name: str) -> Leaves:
        core_N, w1 = cores_N[name]["core"], shared[name]["w1"]
        w2 = jax.vmap(at, in_axes=(0, 1))(w1, core_N) if w1.ndim == 3 else at(w1, core_N)
        return shared[name] | {"w2": w2}

    with jax.default_matmul_precision("highest"):
        return {name: at_site(name) for name in shared}


METHOD = AdapterMethod(
    name="conditioned",
    state_axes={"traits": ("groups", "vector")},
    shared_axes={
        "a": ("rank", "in"),
        "b": ("rank", "out"),
        "w1": ("vector", "vector"),
        "w2": ("vector", "rank", "rank"),
    },
    shared=_shared,
    init=_init,
    delta=_delta,
    factors=_factors,
    inits={"default": True},
    linear=False,
    learning_rate=1e-2,
    tied=True,
    options=Options,
)
