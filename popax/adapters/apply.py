"""Adapters bound to a model: the callable pytree that a model calls at its sites (popax.types.Adapt)."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp

from popax.adapters.base import IndexedSite
from popax.adapters.cohort import Cohort, scales
from popax.types import AdapterState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SiteAdapters:
    """A SiteFn over the arrays of some sites; the model's layer scan slices the leaves of the layered ones.

    slot: None when the state is one user's; else int [B], each row's slot on the state's leading axis, -1 for base
    only.
    """

    cohort: Cohort = dataclasses.field(metadata={"static": True})
    state: AdapterState
    shared: AdapterState
    scale: dict[str, jax.Array]
    dropout_key: jax.Array | None = None
    slot: jax.Array | None = None

    def __call__(self, x: jax.Array, ys: dict[str, jax.Array]) -> dict[str, jax.Array]:
        adapted = [site for site in ys if site in self.state]
        operands = {site: (self.state[site], self.shared.get(site, {}), self.scale[site]) for site in adapted}
        if self.slot is not None and adapted:
            sites = tuple(IndexedSite(*operands[site], ys[site]) for site in adapted)
            return ys | dict(zip(adapted, self.cohort.method.indexed(sites, x, self.slot), strict=True))
        delta = self.cohort.method.delta
        return ys | {site: delta(*operands[site], x, ys[site], self._dropout(site)) for site in adapted}

    def acts_on(self, site: str) -> bool:
        return site in self.state

    def _dropout(self, site: str):
        return lambda features: self._drop(site, features)

    def _drop(self, site: str, x: jax.Array) -> jax.Array:
        rate = self.cohort.config.dropout
        if self.dropout_key is None or rate == 0.0:
            return x
        key = jax.random.fold_in(self.dropout_key, zlib.crc32(site.encode()))
        keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
        return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoundAdapter:
    """An Adapt: the layered sites' arrays with L first, and the others'."""

    layers: SiteAdapters
    outer: SiteAdapters


def bind(
    cohort: Cohort, adapter: AdapterState, shared: AdapterState, *, dropout_key: jax.Array | None = None
) -> BoundAdapter:
    """One user's adapter on a model. dropout_key: a training step's key; without it nothing is dropped."""
    layer_keys, outer_key = None, None
    if dropout_key is not None and cohort.config.dropout > 0.0:
        layer_key, outer_key = jax.random.split(dropout_key)
        layer_keys = jax.random.split(layer_key, max((len(spec.ranks) for spec in cohort.sites), default=1))
    return _bound(cohort, adapter, shared, layer_keys, outer_key, None, None)


def bind_slots(cohort: Cohort, pool: AdapterState, shared: AdapterState, slot_B: jax.Array) -> BoundAdapter:
    """Many users' adapters for a batch of mixed rows.

    pool: {site: {leaf: [L, S, ...]}}, slots after layers so that the layer scan's slices are contiguous; [S, ...] at
    sites outside the stack. slot_B: int [B], -1 for base only.
    """
    num_layers = max((spec.info.layers for spec in cohort.sites), default=0)
    slot_LxB = jnp.broadcast_to(slot_B, (num_layers, *slot_B.shape))
    return _bound(cohort, pool, shared, None, None, slot_LxB, slot_B)


def _bound(cohort, adapter, shared, layer_keys, outer_key, layer_slots, outer_slots) -> BoundAdapter:
    def part(layered: bool, key, slot) -> SiteAdapters:
        specs = {name: spec for name, spec in cohort.specs.items() if bool(spec.info.layers) == layered}
        return SiteAdapters(
            cohort=cohort,
            state={name: adapter[name] for name in specs},
            shared={name: shared[name] for name in specs if name in shared},
            scale={name: scales(spec) for name, spec in specs.items()},
            dropout_key=key,
            slot=slot,
        )

    # Without layered sites there is nothing for the scan to slice: its part then carries no leaves at all.
    has_layers = any(spec.info.layers for spec in cohort.sites)
    return BoundAdapter(
        layers=part(True, layer_keys if has_layers else None, layer_slots if has_layers else None),
        outer=part(False, outer_key, outer_slots),
    )
