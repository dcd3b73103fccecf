"""LoRA: delta = s (x A^T) B, A random, B zero (arXiv 2106.09685). Two factors a site are the user's.

Its other starts, which begin at the base's own singular vectors, have rows of their own (lora_starts, mica).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from popax.adapters import lora_starts, mica
from popax.adapters.base import AdapterConfig
from popax.adapters.lora_experts import EXPERTS
from popax.adapters.method import AdapterMethod, IndexedSite, Leaves, SiteDims
from popax.errors import ConfigError
from popax.kernels.indexed_lora import indexed_lora_sites
from popax.kernels.stacked_lora import lora


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """b_rate: B's learning rate over A's. LoRA+ (arXiv 2402.12354) advises about 16."""

    b_rate: float = 1.0

    def __post_init__(self):
        if not (math.isfinite(self.b_rate) and self.b_rate > 0):
            raise ConfigError(f"b_rate={self.b_rate}: a finite factor above 0 on B's learning rate")


def random_a_zero_b(key: jax.Array, dims: SiteDims, mask_R: jax.Array, config: AdapterConfig, options) -> Leaves:
    """B = 0; A ~ U(-1/sqrt(D), 1/sqrt(D)) ("default") or N(0, 1/r^2) with the layer's own rank r ("gaussian").

    Both are PEFT's: its default is kaiming-uniform with a = sqrt 5, which is that bound.
    """
    del options
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


def _variant(config: AdapterConfig) -> AdapterMethod:
    return STARTS.get(config.init, METHOD)


METHOD = AdapterMethod(
    name="lora",
    state_axes={"a": ("rank", "in"), "b": ("rank", "out")},
    init=random_a_zero_b,
    delta=_delta,
    indexed=_indexed,
    factors=_factors,
    shrink=lambda state, factor: state | {"b": state["b"] * factor},
    inits={"default": True, "gaussian": True, **dict.fromkeys((*lora_starts.METHODS, "mica"), True)},
    linear=False,
    learning_rate=1e-3,
    options=Options,
    rates=lambda options: {"b": options.b_rate},
    variant=_variant,
    experts=EXPERTS,
)


def _start(row: AdapterMethod) -> AdapterMethod:
    """A start's row takes this one's options; it has no form at routed experts."""
    rates = METHOD.rates if "b" in row.state_axes else row.rates
    return row._replace(options=Options, rates=rates)


# Starts that have arrays of their own.
STARTS = {start: _start(row) for start, row in (lora_starts.METHODS | {"mica": mica.METHOD}).items()}
