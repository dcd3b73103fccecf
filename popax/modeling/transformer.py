"""The decoder block, the parts around the stack of blocks, and the scan over the stack."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from popax.modeling.attention import Attention, Seen
from popax.modeling.cache import Cache, CacheView, LayerCache, PagedCache, RaggedCache
from popax.modeling.config import ModelConfig
from popax.modeling.context_parallel import keep_cut
from popax.modeling.latent_attention import LatentAttention
from popax.modeling.layers import Embed, Linear, RMSNorm, SwiGLU
from popax.modeling.loss import cross_entropy, frozen_head_nats
from popax.modeling.moe import MoE
from popax.modeling.paged import PagedLayer
from popax.modeling.ragged import RaggedLayer
from popax.modeling.remat import Remat, rematerialised
from popax.modeling.stacks import Stack, hidden_site
from popax.sharding import ShardingRules
from popax.types import ROUTE_DTYPE, SiteFn


class Block(nnx.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)); the MLP of a routed stack is a mixture of experts."""

    def __init__(self, config: ModelConfig, stack: Stack, *, rngs: nnx.Rngs):
        # Two additions a layer: the residual stream keeps its variance at any depth (GPT-2's start).
        shrink = 1 / math.sqrt(2 * config.num_layers)
        self.out = hidden_site(stack)
        self.attn_norm = RMSNorm(config.embed_dim, config.norm_eps, config.param_dtype)
        self.attn = _attention(f"{stack.name}.attn", config, rngs, shrink)
        self.mlp_norm = RMSNorm(config.embed_dim, config.norm_eps, config.param_dtype)
        if config.moe is not None and stack.routed:
            self.moe = MoE(f"{stack.name}.moe", config, config.moe, rngs=rngs, shrink=shrink)
            return
        self.mlp = SwiGLU(
            f"{stack.name}.mlp",
            config.embed_dim,
            config.ffw_dim,
            bias=config.mlp_bias,
            param_dtype=config.param_dtype,
            rngs=rngs,
            out_std=shrink / math.sqrt(config.ffw_dim),
            quantise=config.quantise,
        )

    def __call__(
        self,
        x_BxTxD: jax.Array,
        context: "Context",
        site_fn: SiteFn,
        cache: CacheView | None,
        routes_BxTxK: jax.Array | None,
    ) -> tuple[jax.Array, CacheView | None, jax.Array | None]:
        """(x, the cache, the experts of a mixture; None of a dense MLP)."""
        rules, reads = context.rules, (context.rope, context.seen)
        attended_BxTxD, cache = self.attn(self.attn_norm(x_BxTxD), *reads, site_fn, cache, rules)
        x_BxTxD = x_BxTxD + attended_BxTxD
        normed_BxTxD = self.mlp_norm(x_BxTxD)
        taken_BxTxK = None
        if hasattr(self, "moe"):
            y_BxTxD, taken_BxTxK = self.moe(normed_BxTxD, site_fn, rules, routes_BxTxK)
        else:
            y_BxTxD = self.mlp(normed_BxTxD, site_fn)
        x_BxTxD, cache = site_fn.hidden(self.out, x_BxTxD + y_BxTxD, context.positions_BxT, cache)
        return x_BxTxD, cache, taken_BxTxK


def _attention(name: str, config: ModelConfig, rngs: nnx.Rngs, shrink: float) -> Attention | LatentAttention:
    if config.mla is not None:
        out_std = shrink / math.sqrt(config.num_heads * config.mla.v_head_dim)
        return LatentAttention(name, config, config.mla, rngs=rngs, out_std=out_std)
    out_std = shrink / math.sqrt(config.num_heads * config.head_dim)
    return Attention(name, config, rngs=rngs, out_std=out_std)


class Ends(nnx.Module):
    """What is not a layer: the embedding, the last norm, and the head where it is not tied to the embedding."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embed = Embed(config.vocab_size, config.embed_dim, param_dtype=config.param_dtype, rngs=rngs)
        self.final_norm = RMSNorm(config.embed_dim, config.norm_eps, config.param_dtype)
        self.lm_head = None if config.tied_embeddings else Head(config, rngs=rngs)

    def logits(self, x: jax.Array, site_fn: SiteFn) -> jax.Array:
        return self.embed.attend(x) if self.lm_head is None else self.lm_head(x, site_fn)

    def token_nll(
        self, x: jax.Array, targets: jax.Array, site_fn: SiteFn, rules: ShardingRules, *, frozen: bool
    ) -> jax.Array:
        if frozen and self.lm_head is None:
            return frozen_head_nats(x, targets, self.embed.embedding[...], rules, vocab_first=True)
        if frozen and self.lm_head is not None and not site_fn.adapts(self.lm_head.site):
            return frozen_head_nats(x, targets, self.lm_head.matrix(x.dtype), rules, vocab_first=False)
        return cross_entropy(self.logits(x, site_fn), targets)


class Head(Linear):
    """The linear map to logits, which are float32 whatever the activations are."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape, options = (config.embed_dim, config.vocab_size), {"param_dtype": config.param_dtype, "rngs": rngs}
        options["quantise"] = config.quantise
        super().__init__("lm_head", shape, ("embed", "vocab"), bias=False, std=0.02, **options)

    def product(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("...d,dv->...v", x, self.matrix(x.dtype), preferred_element_type=jnp.float32)


class Context(NamedTuple):
    """What every layer reads besides its input: (cos, sin) of the positions, what tokens see, the positions, and how
    the ambient mesh is used."""

    rope: tuple[jax.Array, jax.Array]
    seen: Seen
    positions_BxT: jax.Array
    rules: ShardingRules


def _view(cache: Cache, layer: jax.Array, context: Context) -> CacheView:
    if isinstance(cache, PagedCache):
        return PagedLayer(cache=cache, layer=layer, positions_Mx1=context.positions_BxT)
    if isinstance(cache, RaggedCache):
        return RaggedLayer(cache=cache, layer=layer, positions_Mx1=context.positions_BxT)
    places = {"positions_BxT": context.positions_BxT, "mask_BxTxS": context.seen.mask}
    return LayerCache(cache=cache, layer=layer, **places)


def scan_blocks(
    graphdef: nnx.GraphDef,
    layers: Any,
    site_fns: Any,
    x_BxTxD: jax.Array,
    context: Context,
    cache: Cache | None,
    *,
    routes_LxBxTxK: jax.Array | None = None,
    record: bool = False,
    first_layer: int = 0,
    remat: Remat,
) -> tuple[jax.Array, Cache | None, jax.Array | None]:
    """The blocks of one stack, one after the other: layers and site_fns are pytrees of [L, ...] that the scan slices.

    (x, the cache, where `record` the experts that a routed stack's tokens went to, int16 [L, B, T, K]).
    routes_LxBxTxK: as in `Router.choose`, a routed stack's only. first_layer: where in the cache, which is all stacks',
    the first of them writes.
    """
    num_layers = jax.tree.leaves(layers)[0].shape[0]

    def body(carry: tuple[jax.Array, Cache | None], xs: tuple[Any, Any, jax.Array, jax.Array | None]):
        (x_BxTxD, cache), (params, site_fn, layer, routes_BxTxK) = carry, xs
        view = None
        if cache is not None:
            view = _view(cache, layer, context)
        block = nnx.merge(graphdef, params)
        x_BxTxD = keep_cut(x_BxTxD, context.rules)
        x_BxTxD, view, taken = block(x_BxTxD, context, site_fn, view, routes_BxTxK)
        taken = taken.astype(ROUTE_DTYPE) if record and taken is not None else None
        return (x_BxTxD, None if view is None else view.cache), taken

    body = rematerialised(body, remat)
    numbers = jnp.arange(first_layer, first_layer + num_layers, dtype=jnp.int32)
    (x_BxTxD, cache), taken = jax.lax.scan(body, (x_BxTxD, cache), (layers, site_fns, numbers, routes_LxBxTxK))
    return x_BxTxD, cache, taken
