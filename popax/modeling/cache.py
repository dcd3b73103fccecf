"""What later tokens need of the tokens a model has seen, at the position each token has in its row."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from popax.errors import ConfigError
from popax.modeling.config import DTYPES, ModelConfig

# (queries [B, T, ...], mask [B, T, S], what is cached [B, S, ...] ...) -> [B, T, ...]
Attend = Callable[..., jax.Array]

# (numbers of sequences [B], what is remembered before their tokens [B, W], x [B, T, D], positions [B, T]) ->
# (y [B, T, D], what is remembered after each token [B, T, W], bool [B]: for whom that is to be kept)
Recall = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


class CacheView(Protocol):
    """A cache as one layer sees it."""

    def write(self, *new: jax.Array) -> "CacheView":
        """The view with an array [B, T, ...] for each of the cache's, at the tokens' positions."""
        ...

    def attend(self, queries: jax.Array, attend: Attend) -> jax.Array:
        """attend over what the layer's cache holds, for queries [B, T, ...]; the result is in their order."""
        ...

    def recall(self, x_BxTxD: jax.Array, recall: Recall) -> tuple[jax.Array, "CacheView"]:
        """(recall's y for these tokens, the view with what it remembers after each of them).

        Raises ConfigError where the cache has no memory.
        """
        ...

    @property
    def cache(self) -> "Cache":
        """The whole cache, with what was written."""
        ...


class KVCache(NamedTuple):
    """k, v: [L, B, S, K, head_dim]; slot s of a row holds the token at position s.

    A row is filled from position 0 upwards, so what a token at position p may see is exactly the slots 0..p: nothing
    else has to be kept. memory: float32 [L, B, S, W], what adapters remember after each token; None where none does.
    """

    k: jax.Array
    v: jax.Array
    memory: jax.Array | None = None

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """What the model itself has of each token."""
        return self.k, self.v

    @property
    def length(self) -> int:
        return self.k.shape[2]


class LatentCache(NamedTuple):
    """latent: [L, B, S, C + r], of latent attention: the normalised latent (C features) and beside it the one rotated
    key of all heads (r features), from which keys and values follow. Slots and memory as in KVCache.
    """

    latent: jax.Array
    memory: jax.Array | None = None

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """What the model itself has of each token."""
        return (self.latent,)

    @property
    def length(self) -> int:
        return self.latent.shape[2]


class PagedCache(NamedTuple):
    """Pages that sequences own, for a flat batch [M, 1] of tokens of many sequences.

    pages: for each of the model's cached arrays [L, P, heads, page, features]; latent attention has one, of one head.
    The first R tokens of the batch are one a row; the others are G groups of equal length, a group's of one sequence.
    row_pages: int32 [R, n], group_pages: int32 [G, n]: where a row's positions 0..n*page-1 lie. Entries beyond what a
    sequence owns are any page: no token's position reaches them. A sequence's groups are in the order of its tokens.
    memory: float32 [L, P, page, W], as in KVCache.
    """

    pages: tuple[jax.Array, ...]
    row_pages_RxN: jax.Array
    group_pages_GxN: jax.Array
    memory: jax.Array | None = None

    @property
    def page(self) -> int:
        return self.pages[0].shape[3]


class RaggedCache(NamedTuple):
    """As PagedCache, with the pages in one array [L, P, page, 2 K, head_dim] (popax.modeling.ragged)."""

    pages: tuple[jax.Array, ...]
    row_pages_RxN: jax.Array
    group_pages_GxN: jax.Array
    memory: jax.Array | None = None

    @property
    def page(self) -> int:
        return self.pages[0].shape[2]

    def sizes(self, tokens: int) -> tuple[int, int, int]:
        """(rows, groups, tokens of a group) of a batch of so many tokens."""
        rows, groups = self.row_pages_RxN.shape[0], self.group_pages_GxN.shape[0]
        return rows, groups, (tokens - rows) // groups if groups else 0


def token_places(cache: PagedCache | RaggedCache, positions_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(page, offset) of each token; page number P, which is none, for a token that is none."""
    row_pages_RxN, group_pages_GxN, page = cache.row_pages_RxN, cache.group_pages_GxN, cache.page
    rows, groups, count = row_pages_RxN.shape[0], group_pages_GxN.shape[0], row_pages_RxN.shape[1]
    table_BxN = jnp.concatenate((row_pages_RxN, group_pages_GxN))
    width = (positions_M.shape[0] - rows) // groups if groups else 0
    row_M = jnp.concatenate((jnp.arange(rows), rows + jnp.repeat(jnp.arange(groups), width)))
    at_M = positions_M // page
    page_M = table_BxN[row_M, jnp.clip(at_M, 0, count - 1)]
    nowhere = (positions_M < 0) | (at_M >= count)
    return jnp.where(nowhere, cache.pages[0].shape[1], page_M), positions_M % page


Cache = KVCache | LatentCache | PagedCache | RaggedCache


def init_cache(
    config: ModelConfig, batch: int, length: int, dtype: str | None = None, *, memory: int = 0
) -> KVCache | LatentCache:
    """An empty cache of `length` positions a row. dtype: of what is stored, the config's by default. memory: numbers of
    a token at a layer for what adapters remember (`Adapt.memory`)."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"cache dtype={dtype!r}: one of {', '.join(DTYPES)}")
    places, kind = (config.num_layers, batch, length), dtype or config.dtype
    remembered = jnp.zeros((*places, memory), jnp.float32) if memory else None
    if config.mla is not None:
        width = config.mla.kv_latent_dim + config.mla.rope_head_dim
        return LatentCache(jnp.zeros((*places, width), kind), remembered)
    shape = (*places, config.num_kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, kind), jnp.zeros(shape, kind), remembered)


def memory_of(cache: Cache) -> jax.Array:
    """Raises ConfigError where it has none."""
    if cache.memory is None:
        raise ConfigError(
            "an adapter remembers what it reads, and this cache keeps no memory: make it with Adapt.memory"
        )
    return cache.memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCache:
    """One layer's view of the whole cache, inside the layer scan.

    The scan carries the whole cache and writes only the new tokens into it: passing a layer's slice in and out
    would copy every cached token at every step.
    """

    cache: KVCache | LatentCache
    layer: jax.Array
    positions_BxT: jax.Array
    mask_BxTxS: jax.Array

    def attend(self, queries: jax.Array, attend: Attend) -> jax.Array:
        return attend(queries, self.mask_BxTxS, *self.read(queries.dtype))

    def write(self, *new: jax.Array) -> "LayerCache":
        """An array [B, T, ...] for each of the cache's, at the tokens' positions; -1, or past the end, is dropped."""
        where_BxTx3 = self._places(self.positions_BxT)
        written = [_put(stored, where_BxTx3, each) for stored, each in zip(self.cache.arrays, new, strict=True)]
        return dataclasses.replace(self, cache=type(self.cache)(*written, memory=self.cache.memory))

    def recall(self, x_BxTxD: jax.Array, recall: Recall) -> tuple[jax.Array, "LayerCache"]:
        """As `CacheView.recall`; a row's tokens follow each other."""
        memory, positions_BxT = memory_of(self.cache), self.positions_BxT
        first_B = jnp.min(jnp.where(positions_BxT >= 0, positions_BxT, self.cache.length), axis=1)
        before_B = jnp.clip(first_B - 1, 0, self.cache.length - 1)  # of a text's first token nothing is before
        rows_B = jnp.arange(positions_BxT.shape[0])
        layer = jax.lax.dynamic_index_in_dim(memory, self.layer, keepdims=False)
        y_BxTxD, after_BxTxW, own_B = recall(rows_B, layer[rows_B, before_B], x_BxTxD, positions_BxT)
        where_BxTx3 = self._places(jnp.where(own_B[:, None], positions_BxT, -1))
        memory = _put(memory, where_BxTx3, after_BxTxW)
        return y_BxTxD, dataclasses.replace(self, cache=self.cache._replace(memory=memory))

    def _places(self, positions_BxT: jax.Array) -> jax.Array:
        """(layer, row, slot) of each token."""
        # A negative index would count from the end; one past the end is dropped by the scatter.
        slots_BxT = jnp.where(positions_BxT >= 0, positions_BxT, self.cache.length)

        # Rows as an iota, which `.at[...]` would wrap for negative numbers: the compiler's partitioner knows an iota's
        # rows for each device's own, and gathers tokens or even the cache for other indices.
        rows_BxTx1 = jax.lax.broadcasted_iota(jnp.int32, (*slots_BxT.shape, 1), 0)
        layer_BxTx1 = jnp.full_like(rows_BxTx1, self.layer)
        return jnp.concatenate((layer_BxTx1, rows_BxTx1, slots_BxT[..., None]), axis=-1)

    def read(self, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
        """This layer's part of each of the cache's arrays, [B, S, ...]."""
        layer = (jax.lax.dynamic_index_in_dim(leaf, self.layer, keepdims=False) for leaf in self.cache.arrays)
        return tuple(leaf.astype(dtype) for leaf in layer)


def _put(stored: jax.Array, where_BxTx3: jax.Array, new: jax.Array) -> jax.Array:
    """stored[where[b, t]] = new[b, t], where = (layer, row, slot); stored [L, B, S, ...], new [B, T, ...]."""
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(2, new.ndim)),
        inserted_window_dims=(0, 1, 2),
        scatter_dims_to_operand_dims=(0, 1, 2),
    )
    updates = new.astype(stored.dtype)
    return jax.lax.scatter(stored, where_BxTx3, updates, dimensions, mode=jax.lax.GatherScatterMode.FILL_OR_DROP)
