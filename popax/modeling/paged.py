"""A cache in pages: what a batch of tokens of many sequences writes and reads, each in its own pages."""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

from popax.errors import ConfigError
from popax.modeling.cache import DTYPES, Attend, PagedCache, RaggedCache, Recall, memory_of, token_places
from popax.modeling.config import ModelConfig


def page_shapes(config: ModelConfig, pages: int, page_size: int, dtype: str | None = None) -> tuple:
    """The shapes of so many empty pages of `page_size` tokens each, of all layers: jax.ShapeDtypeStruct.

    The heads come before the tokens: what is gathered for a row is then what a product over its keys wants.
    """
    if pages < 1 or page_size < 1:
        raise ConfigError(f"{pages} pages of {page_size} tokens: at least 1 of each")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"cache dtype={dtype!r}: one of {', '.join(DTYPES)}")
    kind = jnp.dtype(dtype or config.dtype)
    if config.mla is not None:
        width = config.mla.kv_latent_dim + config.mla.rope_head_dim
        return (jax.ShapeDtypeStruct((config.num_layers, pages, 1, page_size, width), kind),)
    shape = (config.num_layers, pages, config.num_kv_heads, page_size, config.head_dim)
    return (jax.ShapeDtypeStruct(shape, kind),) * 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedLayer:
    """One layer's view of the pages, inside the layer scan, which carries all of them as in `LayerCache`.

    positions: int32 [M, 1], -1 for a token that is none.
    """

    cache: PagedCache
    layer: jax.Array
    positions_Mx1: jax.Array

    def write(self, *new: jax.Array) -> "PagedLayer":
        """An array [M, 1, ...] for each of the cache's; the tokens of a group lie in the group's pages."""
        positions_M = self.positions_Mx1[:, 0]
        page_M, offset_M = token_places(self.cache, positions_M)
        pages = tuple(
            stored.at[self.layer, page_M, :, offset_M].set(
                each.reshape(each.shape[0], -1, stored.shape[-1]).astype(stored.dtype), mode="drop"
            )
            for stored, each in zip(self.cache.pages, new, strict=True)
        )
        return dataclasses.replace(self, cache=self.cache._replace(pages=pages))

    def recall(self, x_BxTxD: jax.Array, recall: Recall) -> tuple[jax.Array, "PagedLayer"]:
        """As `CacheView.recall`."""
        y_BxTxD, cache = recalled(self.cache, self.layer, self.positions_Mx1, x_BxTxD, recall)
        return y_BxTxD, dataclasses.replace(self, cache=cache)

    def attend(self, queries: jax.Array, attend: Attend) -> jax.Array:
        """Rows and groups each over their own pages: two attentions, of T = 1 and of a group's length."""
        rows, groups = self.cache.row_pages_RxN.shape[0], self.cache.group_pages_GxN.shape[0]
        parts = [self._part(self.cache.row_pages_RxN, slice(0, rows), queries, attend)] if rows else []
        if groups:
            parts.append(self._part(self.cache.group_pages_GxN, slice(rows, None), queries, attend))
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0]

    def _part(self, table_BxN: jax.Array, where: slice, queries: jax.Array, attend: Attend) -> jax.Array:
        batch = table_BxN.shape[0]
        positions_BxT = self.positions_Mx1[where].reshape(batch, -1)
        own = queries[where].reshape(batch, -1, *queries.shape[2:])
        held = tuple(self._gathered(stored, table_BxN).astype(queries.dtype) for stored in self.cache.pages)
        length = held[0].shape[1]
        mask_BxTxS = jnp.arange(length, dtype=positions_BxT.dtype)[None, None, :] <= positions_BxT[:, :, None]
        out = attend(own, mask_BxTxS, *held)
        return out.reshape(-1, 1, *out.shape[2:])

    def _gathered(self, stored: jax.Array, table_BxN: jax.Array) -> jax.Array:
        """[B, S, heads, features], or [B, S, features] of a latent: the pages of each row, side by side."""
        _, _, heads, page, width = stored.shape
        batch, count = table_BxN.shape
        where = jnp.stack((jnp.full_like(table_BxN, self.layer), table_BxN), axis=-1)
        numbers = jax.lax.GatherDimensionNumbers(
            offset_dims=(1, 3, 4), collapsed_slice_dims=(0, 1), start_index_map=(0, 1)
        )
        sizes, mode = (1, 1, heads, page, width), jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
        found = jax.lax.gather(stored, where, numbers, sizes, mode=mode)  # [B, heads, n, page, width]
        found = found.reshape(batch, heads, count * page, width)
        # A transposition that attention takes back: what it multiplies is what was gathered.
        return found[:, 0] if len(self.cache.pages) == 1 else found.transpose(0, 2, 1, 3)


Pages = TypeVar("Pages", PagedCache, RaggedCache)


def recalled(
    cache: Pages, layer: jax.Array, positions_Mx1: jax.Array, x_Mx1xD: jax.Array, recall: Recall
) -> tuple[jax.Array, Pages]:
    """`CacheView.recall` over pages: all rows at once, then one group after the other.

    A group may go on where one before it ends, with what that one has left in the sequence's pages.
    """
    rows, groups = cache.row_pages_RxN.shape[0], cache.group_pages_GxN.shape[0]
    positions_M, nowhere = positions_Mx1[:, 0], cache.pages[0].shape[1]
    places = (token_places(cache, positions_M), token_places(cache, jnp.maximum(positions_M - 1, 0)))

    def part(memory: jax.Array, sequences_B: jax.Array, own) -> tuple[jax.Array, jax.Array]:
        """own: of these sequences' tokens x [B, T, D], positions [B, T], their places and those before them [B, T]."""
        x_BxTxD, positions_BxT, ((page_BxT, offset_BxT), (before_page_BxT, before_offset_BxT)) = own
        before_BxW = memory.at[layer, before_page_BxT[:, 0], before_offset_BxT[:, 0]].get(mode="clip")
        y_BxTxD, after_BxTxW, kept_B = recall(sequences_B, before_BxW, x_BxTxD, positions_BxT)
        page_BxT = jnp.where(kept_B[:, None], page_BxT, nowhere)
        return memory.at[layer, page_BxT, offset_BxT].set(after_BxTxW, mode="drop"), y_BxTxD

    def cut(where: slice, *shape: int):
        tokens = (x_Mx1xD[:, 0], positions_M, places)
        return jax.tree.map(lambda leaf: leaf[where].reshape(*shape, *leaf.shape[1:]), tokens)

    memory, made = memory_of(cache), []
    if rows:
        memory, y_Rx1xD = part(memory, jnp.arange(rows), cut(slice(0, rows), rows, 1))
        made.append(y_Rx1xD)
    if groups:
        numbers_Gx1 = rows + jnp.arange(groups)[:, None]
        one = lambda memory, group: part(memory, *group)  # noqa: E731
        memory, y_Gx1xTxD = jax.lax.scan(one, memory, (numbers_Gx1, cut(slice(rows, None), groups, 1, -1)))
        made.append(y_Gx1xTxD)
    y_Mx1xD = jnp.concatenate([each.reshape(-1, 1, each.shape[-1]) for each in made])
    return y_Mx1xD, cache._replace(memory=memory)
