"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): a small latent stands for keys and values.

A token's keys and values are W_kv c of its latent c [C] for every head, and one key with positions that heads share.
Only the two are cached. With many queries keys and values are expanded from them; with few, W_kv is absorbed into the
queries and into what attention returns, and attention is over the latents themselves: q (W_k c) = (W_k^T q) c.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from popax.modeling.attention import Seen, dot_product_attention, packed_attention, split_heads
from popax.modeling.block_config import MLAConfig
from popax.modeling.cache import CacheView
from popax.modeling.config import ModelConfig, YarnRope
from popax.modeling.context_parallel import whole_rows
from popax.modeling.layers import Linear, RMSNorm, project
from popax.modeling.rope import rotate, yarn_scale
from popax.sharding import ShardingRules
from popax.types import SiteFn

Rope = tuple[jax.Array, jax.Array]


def softmax_scale(config: ModelConfig) -> float:
    """1/sqrt(head_dim), times the square of YaRN's factor for mscale_all_dim where it is given (DeepSeek-V3)."""
    rope, scale = config.rope_scaling, 1 / math.sqrt(config.head_dim)
    if isinstance(rope, YarnRope) and rope.mscale_all_dim:
        return scale * yarn_scale(rope.factor, rope.mscale_all_dim) ** 2
    return scale


def absorbed_is_cheaper(config: ModelConfig, mla: MLAConfig, queries: int, keys: int) -> bool:
    """Whether attention over latents takes fewer multiplications a head than expanding all keys and values."""
    latent, nope, value = mla.kv_latent_dim, mla.nope_head_dim, mla.v_head_dim
    absorbed = queries * latent * (nope + value) + queries * keys * (2 * latent + mla.rope_head_dim)
    expanded = keys * latent * (nope + value) + queries * keys * (config.head_dim + value)
    return absorbed < expanded


class LatentAttention(nnx.Module):
    """Sites: q_proj, or q_a_proj and q_b_proj around the queries' latent; kv_a_proj and kv_b_proj around the keys'
    and values'; o_proj."""

    def __init__(self, name: str, config: ModelConfig, mla: MLAConfig, *, rngs: nnx.Rngs, out_std: float):
        options = {"param_dtype": config.param_dtype, "rngs": rngs, "quantise": config.quantise}
        embed, latent, queries = config.embed_dim, mla.kv_latent_dim, config.num_heads * config.head_dim
        values = config.num_heads * mla.v_head_dim
        self.config, self.mla = config, mla
        if mla.q_latent_dim is None:
            self.q_proj = Linear(f"{name}.q_proj", (embed, queries), ("embed", "heads"), bias=False, **options)
        else:
            inner, outer = (embed, mla.q_latent_dim), (mla.q_latent_dim, queries)
            bias = config.attention_bias
            self.q_a_proj = Linear(f"{name}.q_a_proj", inner, ("embed", "q_latent"), bias=bias, **options)
            self.q_a_norm = RMSNorm(mla.q_latent_dim, mla.latent_norm_eps, config.param_dtype)
            self.q_b_proj = Linear(f"{name}.q_b_proj", outer, ("q_latent", "heads"), bias=False, **options)
        inner, outer = (embed, latent + mla.rope_head_dim), (latent, config.num_heads * mla.nope_head_dim + values)
        bias = config.attention_bias
        self.kv_a_proj = Linear(f"{name}.kv_a_proj", inner, ("embed", "kv_latent"), bias=bias, **options)
        self.kv_a_norm = RMSNorm(latent, mla.latent_norm_eps, config.param_dtype)
        self.kv_b_proj = Linear(f"{name}.kv_b_proj", outer, ("kv_latent", "heads"), bias=False, **options)
        shape, bias = (values, embed), config.output_bias
        self.o_proj = Linear(f"{name}.o_proj", shape, ("heads", "embed"), bias=bias, std=out_std, **options)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        rope: Rope,
        seen: Seen,
        site_fn: SiteFn,
        cache: CacheView | None,
        rules: ShardingRules,
    ) -> tuple[jax.Array, CacheView | None]:
        """(output [B, T, D], the cache with this layer's latents written)."""
        q_BxTxHxd, latent_BxTxc = self._queries_and_latents(x_BxTxD, rope, site_fn)
        if cache is None:
            k_BxTxHxd, v_BxTxHxv = self._expanded(latent_BxTxc, site_fn)
            scale = softmax_scale(self.config)
            out = packed_attention(q_BxTxHxd, k_BxTxHxd, v_BxTxHxv, seen, rules, scale=scale)
        else:
            cache = cache.write(latent_BxTxc)
            out = cache.attend(q_BxTxHxd, functools.partial(self._attend_cache, site_fn, rules))
        return self.o_proj(out.reshape(*x_BxTxD.shape[:2], -1), site_fn), cache

    def _queries_and_latents(self, x_BxTxD: jax.Array, rope: Rope, site_fn: SiteFn) -> tuple[jax.Array, jax.Array]:
        """(q [B, T, H, nope + rope], the normalised latent and the shared rotated key side by side [B, T, C + r])."""
        if self.mla.q_latent_dim is None:
            q_BxTxF, kv_BxTxc = project(x_BxTxD, site_fn, self.q_proj, self.kv_a_proj)
        else:
            q_BxTxQ, kv_BxTxc = project(x_BxTxD, site_fn, self.q_a_proj, self.kv_a_proj)
            q_BxTxF = self.q_b_proj(self.q_a_norm(q_BxTxQ), site_fn)
        q_BxTxHxd = split_heads(q_BxTxF, self.config.num_heads)
        layout, nope = self.config.rope_layout, self.mla.nope_head_dim
        turned_BxTxHxr = rotate(q_BxTxHxd[..., nope:], *rope, layout)
        latent_BxTxC, key_BxTxr = jnp.split(kv_BxTxc, [self.mla.kv_latent_dim], axis=-1)
        key_BxTxr = rotate(key_BxTxr[:, :, None], *rope, layout)[:, :, 0]
        return (
            jnp.concatenate((q_BxTxHxd[..., :nope], turned_BxTxHxr), axis=-1),
            jnp.concatenate((self.kv_a_norm(latent_BxTxC), key_BxTxr), axis=-1),
        )

    def _attend_cache(
        self, site_fn: SiteFn, rules: ShardingRules, q_BxTxHxd: jax.Array, mask_BxTxS: jax.Array, latent: jax.Array
    ) -> jax.Array:
        latent_BxSxc, scale = whole_rows(latent, q_BxTxHxd.shape[1], rules), softmax_scale(self.config)
        # An adapter on kv_b_proj is a function of a latent and its y, not a matrix that could be absorbed as well.
        adapted = site_fn.adapts(self.kv_b_proj.site)
        if adapted or not absorbed_is_cheaper(self.config, self.mla, q_BxTxHxd.shape[1], latent_BxSxc.shape[1]):
            keys_values = self._expanded(latent_BxSxc, site_fn)
            return dot_product_attention(q_BxTxHxd, *keys_values, mask_BxTxS, scale=scale)
        width, nope = self.mla.kv_latent_dim, self.mla.nope_head_dim
        w_CxHxd = split_heads(self.kv_b_proj.matrix(q_BxTxHxd.dtype)[None], self.config.num_heads)[0]
        absorbed_BxTxHxC = jnp.einsum("bthn,chn->bthc", q_BxTxHxd[..., :nope], w_CxHxd[..., :nope])
        query_BxTxHxc = jnp.concatenate((absorbed_BxTxHxC, q_BxTxHxd[..., nope:]), axis=-1)
        # One key head for all queries, and the latents are its values.
        key_BxSx1xc = latent_BxSxc[:, :, None]
        values_BxSx1xC = key_BxSx1xc[..., :width]
        out_BxTxHxC = dot_product_attention(query_BxTxHxc, key_BxSx1xc, values_BxSx1xC, mask_BxTxS, scale=scale)
        return jnp.einsum("bthc,chv->bthv", out_BxTxHxC, w_CxHxd[..., nope:])

    def _expanded(self, latent_BxSxc: jax.Array, site_fn: SiteFn) -> tuple[jax.Array, jax.Array]:
        """(keys [B, S, H, nope + rope], values [B, S, H, v])."""
        latent_BxSxC, key_BxSxr = jnp.split(latent_BxSxc, [self.mla.kv_latent_dim], axis=-1)
        kv_BxSxHxd = split_heads(self.kv_b_proj(latent_BxSxC, site_fn), self.config.num_heads)
        nope_BxSxHxn, v_BxSxHxv = jnp.split(kv_BxSxHxd, [self.mla.nope_head_dim], axis=-1)
        shared_shape = (*nope_BxSxHxn.shape[:-1], key_BxSxr.shape[-1])
        shared_BxSxHxr = jnp.broadcast_to(key_BxSxr[:, :, None], shared_shape)
        return jnp.concatenate((nope_BxSxHxn, shared_BxSxHxr), axis=-1), v_BxSxHxv
