"""Pages for the TPU's ragged paged attention: jax's own kernel, over all layers' pages as one array.

It reads the pages where they lie; `paged.PagedLayer` gathers them first. Keys and values of a token are side by side,
as the kernel wants them: [L, P, page, 2 K, head_dim], head k's key at 2k and its value at 2k + 1.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from popax.modeling.cache import Attend, RaggedCache, Recall, token_places
from popax.modeling.config import ModelConfig
from popax.modeling.paged import recalled

LANES = 128


def fits(config: ModelConfig) -> bool:
    """Whether the kernel has a form for this model: keys and values, with heads of whole lanes."""
    return config.mla is None and config.head_dim % LANES == 0


def ragged_page_shapes(config: ModelConfig, pages: int, page_size: int, dtype: str | None = None) -> tuple:
    """As `paged.page_shapes`, in the kernel's layout."""
    shape = (config.num_layers, pages, page_size, 2 * config.num_kv_heads, config.head_dim)
    return (jax.ShapeDtypeStruct(shape, jnp.dtype(dtype or config.dtype)),)


def _blocks(pages: int, page: int, tokens: int) -> dict[str, int]:
    """The kernel's block sizes: its own table's for the TPU that is attached; a plain choice where none is."""
    if jax.default_backend() == "tpu":
        return {}
    return {"num_kv_pages_per_block": min(pages, max(1, LANES // page)), "num_queries_per_block": min(tokens, 32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaggedLayer:
    """One layer's view, as `paged.PagedLayer`."""

    cache: RaggedCache
    layer: jax.Array
    positions_Mx1: jax.Array

    def write(self, *new: jax.Array) -> "RaggedLayer":
        """Keys and values [M, 1, K, d]."""
        (stored,) = self.cache.pages
        k_MxKxd, v_MxKxd = (each[:, 0].astype(stored.dtype) for each in new)
        both = jnp.stack((k_MxKxd, v_MxKxd), axis=2).reshape(k_MxKxd.shape[0], -1, k_MxKxd.shape[-1])
        page_M, offset_M = token_places(self.cache, self.positions_Mx1[:, 0])
        stored = stored.at[self.layer, page_M, offset_M].set(both, mode="drop")
        return dataclasses.replace(self, cache=self.cache._replace(pages=(stored,)))

    def recall(self, x_BxTxD: jax.Array, recall: Recall) -> tuple[jax.Array, "RaggedLayer"]:
        """As `CacheView.recall`."""
        y_BxTxD, cache = recalled(self.cache, self.layer, self.positions_Mx1, x_BxTxD, recall)
        return y_BxTxD, dataclasses.replace(self, cache=cache)

    def attend(self, queries: jax.Array, attend: Attend) -> jax.Array:
        """Each row, and each group, is a sequence of the kernel's: it has as many keys as its last token may see."""
        del attend  # the kernel's own, of the same meaning
        from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

        (stored,) = self.cache.pages
        layers, pages = stored.shape[:2]
        rows, groups, width = self.cache.sizes(queries.shape[0])
        first_M = jnp.maximum(self.positions_Mx1[:, 0], 0)
        # A group that is not full counts as full: what its last queries see is nobody's, and nobody reads them.
        kv_lens = jnp.concatenate((first_M[:rows] + 1, first_M[rows :: max(width, 1)][:groups] + width))
        starts = jnp.concatenate((jnp.arange(rows), rows + width * jnp.arange(groups + 1)))
        table = jnp.concatenate((self.cache.row_pages_RxN, self.cache.group_pages_GxN))
        # Such a group may end beyond its sequence's pages: it then reads anybody's.
        table = jnp.pad(table, ((0, 0), (0, -(-width // self.cache.page))))
        out = ragged_paged_attention(
            queries[:, 0],
            stored.reshape(layers * pages, *stored.shape[2:]),
            kv_lens.astype(jnp.int32),
            (table + self.layer * pages).astype(jnp.int32),
            starts.astype(jnp.int32),
            jnp.array([rows + groups], jnp.int32),
            sm_scale=1 / math.sqrt(queries.shape[-1]),
            **_blocks(table.shape[1], stored.shape[2], queries.shape[0]),
        )
        return out[:, None]
