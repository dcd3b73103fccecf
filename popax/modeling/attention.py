"""Causal attention over packed rows or a cache, with grouped query heads.

Kernels enter at `packed_attention` (training) and `dot_product_attention` (the cache).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from popax.kernels.attention import packed_attention as in_blocks
from popax.kernels.attention import sees
from popax.modeling.cache import CacheView
from popax.modeling.config import ModelConfig
from popax.modeling.context_parallel import cut_axes, whole_rows
from popax.modeling.layers import Linear, RMSNorm, project
from popax.modeling.rope import rotate
from popax.sharding import ShardingRules
from popax.types import SiteFn

# Measured on two CPU cores at 16 x 256 tokens, 8/4 heads of 64: forward and backward in 80 ms with strips of 64, 102 ms
# with strips of 128, 111 ms with none. Long rows get wider strips, so that programs stay small.
STRIP = 64
MAX_STRIPS = 8
# Longer packed rows go block by block (popax.kernels.attention): measured as above, 512 tokens take 45 ms in strips and
# 59 in blocks, 1,024 take 204 and 138, 4,096 take 4.0 and 2.4 s; and strips keep all scores for the backward pass.
LONGEST_IN_STRIPS = 512


class Seen(NamedTuple):
    """What each token sees. mask_BxTxS: bool, of a cache, and of short packed rows. segments_BxT: int32, of packed
    rows; all that there is of long ones, whose mask would grow with the square of the row."""

    mask_BxTxS: jax.Array | None = None
    segments_BxT: jax.Array | None = None

    @classmethod
    def in_segments(cls, segments_BxT: jax.Array) -> "Seen":
        """Of packed rows; `popax.kernels.attention.sees` says what segments below 0 are."""
        short = segments_BxT.shape[1] <= LONGEST_IN_STRIPS
        return cls(packed_mask(segments_BxT) if short else None, segments_BxT)

    @property
    def mask(self) -> jax.Array:
        """bool [B, T, S], made where it is not there."""
        if self.mask_BxTxS is not None:
            return self.mask_BxTxS
        assert self.segments_BxT is not None
        return packed_mask(self.segments_BxT)


def dot_product_attention(
    q_BxTxHxd: jax.Array,
    k_BxSxKxd: jax.Array,
    v_BxSxKxd: jax.Array,
    mask_BxTxS: jax.Array,
    *,
    scale: float | None = None,
    cut: bool = False,
) -> jax.Array:
    """softmax(scale q k^T) v over the keys that the mask allows, [B, T, H, features of v] in q's dtype.

    cut: the queries of a row lie on several devices.
    scale: 1/sqrt(d) by default. Query head h reads kv head h // (H/K), which is not repeated in memory. The softmax is
    float32. A query that may see no key gets the mean of all values: finite, and only padding is such a query.
    """
    q_BxKxGxTxd, k_BxKxSxd, v_BxKxSxd = _heads_first(q_BxTxHxd, k_BxSxKxd, v_BxSxKxd)
    return _heads_last(_attend(q_BxKxGxTxd, k_BxKxSxd, v_BxKxSxd, mask_BxTxS, scale, cut=cut))


def causal_attention(
    q_BxTxHxd: jax.Array,
    k_BxTxKxd: jax.Array,
    v_BxTxKxd: jax.Array,
    mask_BxTxT: jax.Array,
    *,
    scale: float | None = None,
) -> jax.Array:
    """`dot_product_attention` under a mask that allows no later key, at little more than half its cost.

    Queries go in strips, and a strip meets the keys up to its own end only.
    """
    q_BxKxGxTxd, k_BxKxTxd, v_BxKxTxd = _heads_first(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd)
    length = q_BxTxHxd.shape[1]
    width = max(STRIP, -(-length // MAX_STRIPS))
    strips = []
    for start in range(0, length, width):
        end = min(start + width, length)
        mask_BxtxS = mask_BxTxT[:, start:end, :end]
        strip = (q_BxKxGxTxd[..., start:end, :], k_BxKxTxd[..., :end, :], v_BxKxTxd[..., :end, :])
        strips.append(_attend(*strip, mask_BxtxS, scale))
    return _heads_last(jnp.concatenate(strips, axis=-2))


def packed_attention(
    q_BxTxHxd: jax.Array,
    k_BxTxKxd: jax.Array,
    v_BxTxKxd: jax.Array,
    seen: Seen,
    rules: ShardingRules,
    *,
    scale: float | None = None,
) -> jax.Array:
    """`causal_attention` of short rows, and in blocks of long ones; of queries that stay on the devices that have them.

    A token that sees none (padding) gets something finite. Rows that lie on several devices have all their scores at
    once, however long.
    """
    length = q_BxTxHxd.shape[1]
    if not cut_axes(length, rules):
        if seen.mask_BxTxS is not None:
            return causal_attention(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, seen.mask_BxTxS, scale=scale)
        assert seen.segments_BxT is not None
        heads_first = _heads_first(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd)
        scale = 1 / math.sqrt(q_BxTxHxd.shape[-1]) if scale is None else scale
        return _heads_last(in_blocks(*heads_first, seen.segments_BxT, scale=scale))
    # No strips: they would take turns on the devices, each of which has one part of the queries.
    keys, values = (whole_rows(each, length, rules) for each in (k_BxTxKxd, v_BxTxKxd))
    return dot_product_attention(q_BxTxHxd, keys, values, seen.mask, scale=scale, cut=True)


def _heads_first(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batched matrix products want the batch outermost: [B, K, G, T, d], [B, K, S, d] twice."""
    batch, length, heads, dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], dim)
    return grouped.transpose(0, 2, 3, 1, 4), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def _heads_last(out_BxKxGxTxd: jax.Array) -> jax.Array:
    batch, kv_heads, groups, length, dim = out_BxKxGxTxd.shape
    return out_BxKxGxTxd.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * groups, dim)


def _attend(
    q_BxKxGxTxd: jax.Array,
    k_BxKxSxd: jax.Array,
    v_BxKxSxd: jax.Array,
    mask_BxTxS: jax.Array,
    scale: float | None,
    *,
    cut: bool = False,
) -> jax.Array:
    batch, kv_heads, groups, length, dim = q_BxKxGxTxd.shape
    scale = 1 / math.sqrt(dim) if scale is None else scale
    # The queries of a group as further rows: one product for each kv head. The partitioner cannot say of such rows that
    # they are sharded along the sequence, and would bring all of them to each device.
    rows = q_BxKxGxTxd if cut else q_BxKxGxTxd.reshape(batch, kv_heads, groups * length, dim)
    scores = jnp.einsum("bk...d,bksd->bk...s", rows, k_BxKxSxd, preferred_element_type=jnp.float32)
    scores_BxKxGxTxS = scores.reshape(batch, kv_heads, groups, length, -1) * jnp.float32(scale)
    lowest = jnp.float32(jnp.finfo(jnp.float32).min)
    scores_BxKxGxTxS = jnp.where(mask_BxTxS[:, None, None], scores_BxKxGxTxS, lowest)
    weights_BxKxGxTxS = jax.nn.softmax(scores_BxKxGxTxS, axis=-1).astype(v_BxKxSxd.dtype)
    out = jnp.einsum("bk...s,bksd->bk...d", weights_BxKxGxTxS.reshape(scores.shape), v_BxKxSxd)
    return out.reshape(batch, kv_heads, groups, length, -1)


def packed_mask(segments_BxT: jax.Array) -> jax.Array:
    """bool [B, T, T]: what each token of a packed row sees (`popax.kernels.attention.sees`)."""
    at_T = jnp.arange(segments_BxT.shape[1])
    return sees(segments_BxT, segments_BxT, at_T, at_T)


def cache_mask(positions_BxT: jax.Array, length: int) -> jax.Array:
    """bool [B, T, S]: a token at position p sees the cache's positions 0..p; one at -1 sees nothing."""
    return jnp.arange(length, dtype=positions_BxT.dtype)[None, None, :] <= positions_BxT[:, :, None]


class Attention(nnx.Module):
    """Grouped-query attention with RoPE; q and k normalised per head where the config says so (Qwen3)."""

    def __init__(self, name: str, config: ModelConfig, *, rngs: nnx.Rngs, out_std: float):
        wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        options = {"param_dtype": config.param_dtype, "rngs": rngs, "quantise": config.quantise}
        inner = {"bias": config.attention_bias, **options}
        embed = config.embed_dim
        self.config = config
        self.q_proj = Linear(f"{name}.q_proj", (embed, wide), ("embed", "heads"), **inner)
        self.k_proj = Linear(f"{name}.k_proj", (embed, narrow), ("embed", "kv_heads"), **inner)
        self.v_proj = Linear(f"{name}.v_proj", (embed, narrow), ("embed", "kv_heads"), **inner)
        self.o_proj = Linear(
            f"{name}.o_proj", (wide, embed), ("heads", "embed"), bias=config.output_bias, std=out_std, **options
        )
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, config.param_dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, config.param_dtype) if config.qk_norm else None

    def __call__(
        self,
        x_BxTxD: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        seen: Seen,
        site_fn: SiteFn,
        cache: CacheView | None,
        rules: ShardingRules,
    ) -> tuple[jax.Array, CacheView | None]:
        """(output [B, T, D], the cache with this layer's keys and values written)."""
        config = self.config
        flat = project(x_BxTxD, site_fn, self.q_proj, self.k_proj, self.v_proj)
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        q_BxTxHxd, k_BxTxKxd, v_BxTxKxd = (split_heads(*each) for each in zip(flat, heads, strict=True))
        if self.q_norm is not None and self.k_norm is not None:
            q_BxTxHxd, k_BxTxKxd = self.q_norm(q_BxTxHxd), self.k_norm(k_BxTxKxd)
        q_BxTxHxd = rotate(q_BxTxHxd, *rope, config.rope_layout)
        k_BxTxKxd = rotate(k_BxTxKxd, *rope, config.rope_layout)
        if cache is None:
            out = packed_attention(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, seen, rules)
        else:
            cache = cache.write(k_BxTxKxd, v_BxTxKxd)
            out = cache.attend(q_BxTxHxd, functools.partial(_over_cache, rules))
        return self.o_proj(out.reshape(*x_BxTxD.shape[:2], -1), site_fn), cache


def _over_cache(rules: ShardingRules, q_BxTxHxd, mask_BxTxS, k_BxSxKxd, v_BxSxKxd) -> jax.Array:
    length = q_BxTxHxd.shape[1]
    keys, values = (whole_rows(each, length, rules) for each in (k_BxSxKxd, v_BxSxKxd))
    return dot_product_attention(q_BxTxHxd, keys, values, mask_BxTxS, cut=bool(cut_axes(length, rules)))


def split_heads(y_BxTxF: jax.Array, heads: int) -> jax.Array:
    """[B, T, heads * d] as [B, T, heads, d]."""
    return y_BxTxF.reshape(*y_BxTxF.shape[:-1], heads, -1)
