"""Adapters bound to a model: the callable pytree that a model calls at its sites (popax.types.Adapt)."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp

from popax.adapters.base import IndexedSite
from popax.adapters.cohort import Cohort, scales
from popax.types import AdapterState, ExpertFactors, ExpertTerms


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

    def adapts(self, site: str) -> bool:
        return site in self.state

    def expert_terms(self, x_BxTxD: jax.Array, sites: tuple[str, str, str]) -> ExpertTerms | None:
        method = self.cohort.method.experts
        if method is None or not any(map(self.adapts, sites)):
            return None

        def own(site: str) -> jax.Array | None:
            if not self.adapts(site):
                return None
            factor = method.own(self.state[site])
            return factor[None] if self.slot is None else factor

        def before(site: str) -> jax.Array | None:
            if not self.adapts(site):
                return None
            return method.before(self.state[site], self.scale[site], self._drop(site, x_BxTxD), self.slot)

        gate, up, down = sites
        factors = ExpertFactors(gate=own(gate), up=own(up), down=own(down), in_order=self.slot is None)
        slot_B = jnp.zeros(x_BxTxD.shape[0], jnp.int32) if self.slot is None else self.slot.astype(jnp.int32)
        return ExpertTerms(jnp.broadcast_to(slot_B[:, None], x_BxTxD.shape[:2]), before(gate), before(up), factors)

    def after_experts(self, site: str, low_BxTxR: jax.Array, y_BxTxD: jax.Array) -> jax.Array:
        method = self.cohort.method.experts
        if method is None or not self.adapts(site):
            return y_BxTxD
        return method.after(self.state[site], self.scale[site], low_BxTxR, y_BxTxD, self.slot)

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
    """An Adapt: the sites' arrays of each stack with its L first, and the others'."""

    dense_layers: SiteAdapters
    layers: SiteAdapters
    outer: SiteAdapters


def bind(
    cohort: Cohort, adapter: AdapterState, shared: AdapterState, *, dropout_key: jax.Array | None = None
) -> BoundAdapter:
    """One user's adapter on a model. dropout_key: a training step's key; without it nothing is dropped."""
    keys = None
    if dropout_key is not None and cohort.config.dropout > 0.0:
        keys = jax.random.split(dropout_key)
    return _bound(cohort, adapter, shared, keys, None)


def bind_slots(cohort: Cohort, pool: AdapterState, shared: AdapterState, slot_B: jax.Array) -> BoundAdapter:
    """Many users' adapters for a batch of mixed rows.

    pool: {site: {leaf: [L, S, ...]}}, slots after layers so that the layer scan's slices are contiguous; [S, ...] at
    sites outside the stacks. slot_B: int [B], -1 for base only.
    """
    return _bound(cohort, pool, shared, None, slot_B)


def _bound(
    cohort: Cohort, adapter: AdapterState, shared: AdapterState, keys: jax.Array | None, slot_B: jax.Array | None
) -> BoundAdapter:
    def part(names: list[str], key: jax.Array | None, slot: jax.Array | None) -> SiteAdapters:
        return SiteAdapters(
            cohort=cohort,
            state={name: adapter[name] for name in names},
            shared={name: shared[name] for name in names if name in shared},
            scale={name: scales(cohort.specs[name]) for name in names},
            dropout_key=key,
            slot=slot,
        )

    def stack(prefix: str) -> SiteAdapters:
        specs = {name: spec for name, spec in cohort.specs.items() if spec.info.layers and name.startswith(prefix)}
        if not specs:  # nothing for the scan to slice: its part then carries no leaves at all
            return part([], None, None)
        num_layers = max(spec.info.layers for spec in specs.values())
        layer_keys = None if keys is None else jax.random.split(keys[0], num_layers)
        slot_LxB = None if slot_B is None else jnp.broadcast_to(slot_B, (num_layers, *slot_B.shape))
        return part(list(specs), layer_keys, slot_LxB)

    outer = [name for name, spec in cohort.specs.items() if not spec.info.layers]
    return BoundAdapter(
        dense_layers=stack("dense_layers."),
        layers=stack("layers."),
        outer=part(outer, None if keys is None else keys[1], slot_B),
    )
