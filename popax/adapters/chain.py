"""Several sets of slots on one model, one after the other: users of different cohorts, and sums of adapters.

Each adds its delta to what it is given, and a token whose slot is -1 in a set keeps its bits there. So a batch may hold
users of any cohort, and a token with a slot in several sets has the exact sum of their deltas, nothing merged.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from popax.adapters.apply import BoundAdapter, SiteAdapters
from popax.errors import ConfigError
from popax.types import NO_ADAPT, Adapt, ExpertTerms


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChainedSites:
    """A SiteFn: the links' deltas on top of each other. At routed experts one link acts at most (see `chain`)."""

    links: tuple[SiteAdapters, ...]

    def __call__(self, x: jax.Array, ys: dict[str, jax.Array]) -> dict[str, jax.Array]:
        for link in self.links:
            ys = link(x, ys)
        return ys

    def adapts(self, site: str) -> bool:
        return any(link.adapts(site) for link in self.links)

    def hidden(self, site: str, x_BxTxD: jax.Array, positions_BxT: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        for link in self.links:
            x_BxTxD, cache = link.hidden(site, x_BxTxD, positions_BxT, cache)
        return x_BxTxD, cache

    def embedded(self, x_BxTxD: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
        for link in self.links:
            x_BxTxD = link.embedded(x_BxTxD, tokens_BxT)
        return x_BxTxD

    def has_virtual(self, batch: int) -> jax.Array:
        return functools.reduce(jnp.logical_or, (link.has_virtual(batch) for link in self.links))

    def expert_terms(self, x_BxTxD: jax.Array, sites: tuple[str, str, str]) -> ExpertTerms | None:
        found = [link for link in self.links if any(map(link.adapts, sites))]
        return found[0].expert_terms(x_BxTxD, sites) if found else None

    def after_experts(self, site: str, low_BxTxR: jax.Array, y_BxTxD: jax.Array) -> jax.Array:
        for link in self.links:
            y_BxTxD = link.after_experts(site, low_BxTxR, y_BxTxD)
        return y_BxTxD


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChainedAdapters:
    """An Adapt of several."""

    dense_layers: ChainedSites
    layers: ChainedSites
    outer: ChainedSites

    @property
    def virtual_tokens(self) -> int:
        counts = {link.cohort.virtual_tokens for link in self.outer.links} - {0}
        if len(counts) > 1:
            raise ConfigError(f"prompts of {sorted(counts)} virtual tokens in one batch: only a cache has each of them")
        return max(counts, default=0)

    @property
    def memory(self) -> int:
        return max(link.cohort.memory for link in self.outer.links)


def chain(bound: Sequence[BoundAdapter]) -> Adapt:
    """All of these at once. Of those who act on routed experts there is one at most: their rows are sorted once."""
    if len(bound) < 2:
        return bound[0] if bound else NO_ADAPT

    def links(part: Callable[[BoundAdapter], SiteAdapters]) -> ChainedSites:
        return ChainedSites(tuple(map(part, bound)))

    return ChainedAdapters(
        links(lambda each: each.dense_layers), links(lambda each: each.layers), links(lambda each: each.outer)
    )
