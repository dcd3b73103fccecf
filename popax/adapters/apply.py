"""Adapters bound to a model: the callable pytree that a model calls at its sites (popax.types.Adapt)."""

import dataclasses
import functools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from popax.adapters.cohort import Cohort, scales
from popax.adapters.memory import Reader, recall_rows
from popax.adapters.method import IndexedSite, indexed_rows
from popax.errors import ConfigError
from popax.modeling.virtual import virtual_ids
from popax.types import EMBED, AdapterState, ExpertFactors, ExpertTerms


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SiteAdapters:
    """A SiteFn over the arrays of some sites; the model's layer scan slices the leaves of the layered ones.

    slot: None when the state is one user's; else int [B], each row's slot on the state's leading axis, -1 for base
    only, or int [B, T], each token's. rows: of a flat batch [M, 1] (popax.modeling.cache.PagedCache): its first so many
    tokens have a slot each, the others, in groups of equal length, a slot for each group. weight: float32 [B], a factor
    on each row's delta, which skips the delta altogether where no row has a slot; only methods whose delta is a product
    with x have other factors than 1 (`Cohort.adds`).
    """

    cohort: Cohort = dataclasses.field(metadata={"static": True})
    state: AdapterState
    shared: AdapterState
    scale: dict[str, jax.Array]
    dropout_key: jax.Array | None = None
    slot: jax.Array | None = None
    rows: int | None = dataclasses.field(default=None, metadata={"static": True})
    weight: jax.Array | None = None

    def __call__(self, x: jax.Array, ys: dict[str, jax.Array]) -> dict[str, jax.Array]:
        adapted = [site for site in ys if site in self.state]
        if self.by_token:
            made = self._tokens(_each_alone(x), {site: _each_alone(ys[site]) for site in adapted})
            return ys | {site: made[site].reshape(ys[site].shape) for site in adapted}
        operands = {site: (self.state[site], self.shared.get(site, {}), self.scale[site]) for site in adapted}
        if self.slot is not None and adapted:
            sites = tuple(IndexedSite(*operands[site], ys[site]) for site in adapted)
            return ys | dict(zip(adapted, self._weighted(sites, x, self.slot), strict=True))
        delta = self.cohort.method.delta
        return ys | {site: delta(*operands[site], x, ys[site], self._dropout(site)) for site in adapted}

    @property
    def by_token(self) -> bool:
        """Whether tokens of one row have slots of their own."""
        return self.slot is not None and self.slot.ndim == 2

    @property
    def _tokens(self) -> "SiteAdapters":
        """For a batch of all tokens as rows of one."""
        assert self.slot is not None
        weight = None if self.weight is None else jnp.repeat(self.weight, self.slot.shape[1])
        return dataclasses.replace(self, slot=self.slot.reshape(-1), weight=weight)

    def _weighted(self, sites: tuple[IndexedSite, ...], x: jax.Array, slot: jax.Array) -> tuple[jax.Array, ...]:
        if self.weight is None:
            return self._indexed(sites, x, slot)
        added = lambda: self._indexed(sites, self._by_weight(x), slot)  # noqa: E731
        return jax.lax.cond(jnp.any(slot >= 0), added, lambda: tuple(site.y_BxTxF for site in sites))

    def _by_weight(self, x: jax.Array) -> jax.Array:
        if self.weight is None or not self.cohort.adds:
            return x
        weight_B = self._each_token(self.weight, x.shape[0])
        return x * weight_B.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))

    def _indexed(self, sites: tuple[IndexedSite, ...], x: jax.Array, slot: jax.Array) -> tuple[jax.Array, ...]:
        if self.rows is None:
            return indexed_rows(self.cohort.method, sites, x, slot)
        groups = slot.shape[0] - self.rows
        parts = []
        for where, batch, slots in (
            (slice(0, self.rows), self.rows, slot[: self.rows]),
            (slice(self.rows, None), groups, slot[self.rows :]),
        ):
            if batch:
                cut = lambda flat, where=where, batch=batch: flat[where].reshape(batch, -1, flat.shape[-1])  # noqa: E731
                own = tuple(site._replace(y_BxTxF=cut(site.y_BxTxF)) for site in sites)
                parts.append(indexed_rows(self.cohort.method, own, cut(x), slots))
        flat = [[each.reshape(-1, 1, each.shape[-1]) for each in part] for part in parts]
        return tuple(jnp.concatenate(each) for each in zip(*flat, strict=True))

    def _each_token(self, value_B: jax.Array, tokens: int) -> jax.Array:
        """What rows and groups have, for each row of the batch."""
        if self.rows is None or value_B.shape[0] == self.rows:
            return value_B
        width = (tokens - self.rows) // (value_B.shape[0] - self.rows)
        return jnp.concatenate((value_B[: self.rows], jnp.repeat(value_B[self.rows :], width)))

    def adapts(self, site: str) -> bool:
        return site in self.state

    def hidden(self, site: str, x_BxTxD: jax.Array, positions_BxT: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        if not self.adapts(site):
            return x_BxTxD, cache
        if self.cohort.method.memory is None:
            acts = self.cohort.method.acts(self.cohort.options, positions_BxT)
            return jnp.where(acts[..., None], self(x_BxTxD, {site: x_BxTxD})[site], x_BxTxD), cache
        recall = functools.partial(self._recall, site)
        if cache is not None:
            return cache.recall(x_BxTxD, recall)
        rows = x_BxTxD.shape[0]
        nothing_BxW = jnp.zeros((rows, self.cohort.memory), jnp.float32)
        return recall(jnp.arange(rows), nothing_BxW, x_BxTxD, positions_BxT)[0], None

    def _recall(
        self, site: str, sequences_B: jax.Array, before_BxW: jax.Array, x_BxTxD: jax.Array, positions_BxT: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        form, operands = self.cohort.method.memory, (self.state[site], self.shared.get(site, {}), self.scale[site])
        assert form is not None
        slot_B = None if self.slot is None else self.slot[sequences_B]
        rows = (slot_B, before_BxW, self._drop(site, x_BxTxD), x_BxTxD, positions_BxT)
        return recall_rows(Reader(form, *operands), *rows, skips=self.weight is not None)

    def embedded(self, x_BxTxD: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
        if not self.adapts(EMBED):
            return x_BxTxD
        ids_n = jnp.asarray(virtual_ids(self.cohort.virtual_tokens), tokens_BxT.dtype)
        which_BxTxn = (tokens_BxT[..., None] == ids_n[None, None]).astype(x_BxTxD.dtype)
        return self(which_BxTxn, {EMBED: x_BxTxD})[EMBED]

    def has_virtual(self, batch: int) -> jax.Array:
        own = self.adapts(EMBED)
        return jnp.full(batch, own) if self.slot is None or not own else self.slot >= 0

    def expert_terms(self, x_BxTxD: jax.Array, sites: tuple[str, str, str]) -> ExpertTerms | None:
        method = self.cohort.method.experts
        if method is None or not any(map(self.adapts, sites)):
            return None
        if self.by_token:
            terms, shape = self._tokens.expert_terms(_each_alone(x_BxTxD), sites), x_BxTxD.shape[:2]
            assert terms is not None
            back = lambda low: None if low is None else low.reshape(*shape, low.shape[-1])  # noqa: E731
            return ExpertTerms(
                terms.slot_BxT.reshape(shape), back(terms.gate_BxTxR), back(terms.up_BxTxR), terms.factors
            )
        slot = None if self.slot is None else self._each_token(self.slot, x_BxTxD.shape[0])

        def own(site: str) -> jax.Array | None:
            if not self.adapts(site):
                return None
            factor = method.own(self.state[site])
            return factor[None] if self.slot is None else factor

        def before(site: str) -> jax.Array | None:
            if not self.adapts(site):
                return None
            return method.before(self.state[site], self.scale[site], self._by_weight(self._drop(site, x_BxTxD)), slot)

        gate, up, down = sites
        factors = ExpertFactors(gate=own(gate), up=own(up), down=own(down), in_order=self.slot is None)
        slot_B = jnp.zeros(x_BxTxD.shape[0], jnp.int32) if slot is None else slot.astype(jnp.int32)
        return ExpertTerms(jnp.broadcast_to(slot_B[:, None], x_BxTxD.shape[:2]), before(gate), before(up), factors)

    def after_experts(self, site: str, low_BxTxR: jax.Array, y_BxTxD: jax.Array) -> jax.Array:
        method = self.cohort.method.experts
        if method is None or not self.adapts(site):
            return y_BxTxD
        if self.by_token:
            made = self._tokens.after_experts(site, _each_alone(low_BxTxR), _each_alone(y_BxTxD))
            return made.reshape(y_BxTxD.shape)
        slot = None if self.slot is None else self._each_token(self.slot, y_BxTxD.shape[0])
        return method.after(self.state[site], self.scale[site], self._by_weight(low_BxTxR), y_BxTxD, slot)

    def _dropout(self, site: str):
        return lambda features: self._drop(site, features)

    def _drop(self, site: str, x: jax.Array) -> jax.Array:
        rate = self.cohort.config.dropout
        if self.dropout_key is None or rate == 0.0:
            return x
        key = jax.random.fold_in(self.dropout_key, zlib.crc32(site.encode()))
        keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
        return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


def _each_alone(x_BxTxD: jax.Array) -> jax.Array:
    return x_BxTxD.reshape(-1, 1, x_BxTxD.shape[-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoundAdapter:
    """An Adapt: the sites' arrays of each stack with its L first, and the others'."""

    dense_layers: SiteAdapters
    layers: SiteAdapters
    outer: SiteAdapters

    @property
    def virtual_tokens(self) -> int:
        return self.outer.cohort.virtual_tokens

    @property
    def memory(self) -> int:
        return self.outer.cohort.memory


class Rows(NamedTuple):
    """What SiteAdapters has of a batch of mixed rows."""

    slot_B: jax.Array
    weight_B: jax.Array | None
    rows: int | None

    def each_of(self, layers: int) -> "Rows":
        """With a leading axis that the layer scan slices."""
        slot_LxB, weight_LxB = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (layers, *leaf.shape)), (self.slot_B, self.weight_B)
        )
        return self._replace(slot_B=slot_LxB, weight_B=weight_LxB)


def bind(
    cohort: Cohort, adapter: AdapterState, shared: AdapterState, *, dropout_key: jax.Array | None = None
) -> BoundAdapter:
    """One user's adapter on a model. dropout_key: a training step's key; without it nothing is dropped."""
    keys = None
    if dropout_key is not None and cohort.config.dropout > 0.0:
        keys = jax.random.split(dropout_key)
    return _bound(cohort, adapter, shared, keys, None)


def bind_slots(
    cohort: Cohort,
    pool: AdapterState,
    shared: AdapterState,
    slot_B: jax.Array,
    *,
    rows: int | None = None,
    weight_B: jax.Array | None = None,
) -> BoundAdapter:
    """Many users' adapters for a batch of mixed rows.

    pool: {site: {leaf: [L, S, ...]}}, slots after layers so that the layer scan's slices are contiguous; [S, ...] at
    sites outside the stacks. slot_B: int [B], -1 for base only; or [B, T], a slot for each token, so that parts of a
    text have adapters of their own (Context-PEFT, arXiv 2312.08900). rows: as in SiteAdapters, of a flat batch; slots
    of its groups follow those of its rows. weight_B: of each row's delta. Raises ConfigError for slots of tokens where
    the method puts virtual tokens before a row, or remembers.
    """
    if slot_B.ndim == 2 and (cohort.virtual_tokens or cohort.memory or rows is not None):
        raise ConfigError(
            f"method={cohort.config.method!r}, rows={rows}: a slot for each token is for whole rows, and for methods "
            "that put no virtual tokens before them and remember nothing from token to token"
        )
    return _bound(cohort, pool, shared, None, Rows(slot_B, weight_B, rows))


def _bound(
    cohort: Cohort, adapter: AdapterState, shared: AdapterState, keys: jax.Array | None, rows: Rows | None
) -> BoundAdapter:
    adapter = cohort.spread(adapter, slots=rows is not None)

    def part(names: list[str], key: jax.Array | None, rows: Rows | None) -> SiteAdapters:
        return SiteAdapters(
            cohort=cohort,
            state={name: adapter[name] for name in names},
            shared={name: shared[name] for name in names if name in shared},
            scale={name: scales(cohort.specs[name]) for name in names},
            dropout_key=key,
            slot=rows.slot_B if rows else None,
            rows=rows.rows if rows else None,
            weight=rows.weight_B if rows else None,
        )

    def stack(prefix: str) -> SiteAdapters:
        specs = {name: spec for name, spec in cohort.specs.items() if spec.info.layers and name.startswith(prefix)}
        if not specs:  # nothing for the scan to slice: its part then carries no leaves at all
            return part([], None, None)
        num_layers = max(spec.info.layers for spec in specs.values())
        layer_keys = None if keys is None else jax.random.split(keys[0], num_layers)
        return part(list(specs), layer_keys, rows and rows.each_of(num_layers))

    outer = [name for name, spec in cohort.specs.items() if not spec.info.layers]
    return BoundAdapter(
        dense_layers=stack("dense_layers."),
        layers=stack("layers."),
        outer=part(outer, None if keys is None else keys[1], rows),
    )
