"""Keys and values of the tokens a model has seen, at the position each token has in its row."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from popax.errors import ConfigError
from popax.modeling.config import DTYPES, ModelConfig


class KVCache(NamedTuple):
    """k, v: [L, B, S, K, head_dim]; slot s of a row holds the token at position s.

    A row is filled from position 0 upwards, so what a token at position p may see is exactly the slots 0..p: nothing
    else has to be kept.
    """

    k: jax.Array
    v: jax.Array

    @property
    def length(self) -> int:
        return self.k.shape[2]


def init_cache(config: ModelConfig, batch: int, length: int, dtype: str | None = None) -> KVCache:
    """An empty cache of `length` positions a row. dtype: of the stored keys and values, the config's by default."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"cache dtype={dtype!r}: one of {', '.join(DTYPES)}")
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype or config.dtype), jnp.zeros(shape, dtype or config.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCache:
    """One layer's view of the whole cache, inside the layer scan.

    The scan carries the whole cache and writes only the new tokens into it: passing a layer's slice in and out
    would copy every cached token at every step.
    """

    cache: KVCache
    layer: jax.Array
    positions_BxT: jax.Array

    def write(self, k_BxTxKxd: jax.Array, v_BxTxKxd: jax.Array) -> "LayerCache":
        """The keys and values at their positions; those at position -1, or past the end, are dropped."""
        rows_Bx1 = jnp.arange(k_BxTxKxd.shape[0], dtype=jnp.int32)[:, None]
        # A negative index would count from the end; one past the end is dropped by the scatter.
        slots_BxT = jnp.where(self.positions_BxT >= 0, self.positions_BxT, self.cache.length)

        def put(stored: jax.Array, new: jax.Array) -> jax.Array:
            return stored.at[self.layer, rows_Bx1, slots_BxT].set(new.astype(stored.dtype), mode="drop")

        cache = KVCache(put(self.cache.k, k_BxTxKxd), put(self.cache.v, v_BxTxKxd))
        return dataclasses.replace(self, cache=cache)

    def read(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """This layer's (k, v), [B, S, K, head_dim]."""
        k, v = (jax.lax.dynamic_index_in_dim(leaf, self.layer, keepdims=False) for leaf in self.cache)
        return k.astype(dtype), v.astype(dtype)
