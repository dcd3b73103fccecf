"""A base model as pure functions of its parameters; what is static about it is hashable, so jit may close over it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from popax.errors import ConfigError, SiteError
from popax.modeling.attention import Seen, cache_mask
from popax.modeling.cache import Cache, KVCache, LatentCache
from popax.modeling.config import ModelConfig
from popax.modeling.quantise_rules import QuantiseRule
from popax.modeling.quantised import SCALES, Quantised, dense, dotted, kernel_name, quantisable, stored_weight
from popax.modeling.remat import Remat
from popax.modeling.rope import cos_sin
from popax.modeling.sites import site_infos
from popax.modeling.stacks import Stack, stacks
from popax.modeling.transformer import Block, Context, Ends, scan_blocks
from popax.modeling.virtual import check_room, placed
from popax.sharding import ShardingRules
from popax.trees import flatten_named, unflatten_named
from popax.types import EMBED, NO_ADAPT, Adapt, Batch, Params, SiteInfo


class ForwardOptions(TypedDict, total=False):
    """What `Model.forward` is given beside the parameters and the tokens."""

    positions_BxT: jax.Array | None
    segments_BxT: jax.Array | None
    cache: Cache | None
    adapt: Adapt
    remat: Remat
    embedded_BxTxD: jax.Array | None
    routes_BxTxLxK: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder without its weights. Two models of equal config and rules are equal.

    rules: how an ambient mesh (`jax.set_mesh`) is used, and by default where params lie on a mesh.
    params is a nested dict: {"embed", "layers", "final_norm", "lm_head" (untied only)}, and "dense_layers" where there
    are such before the first mixture of experts; kernels are [d_in, d_out], and everything in a stack of layers has the
    layer axis first. A quantised kernel is {"values", "scales"} in the place of its array.
    """

    config: ModelConfig
    rules: ShardingRules = ShardingRules()  # noqa: RUF009 - frozen

    @functools.cached_property
    def _graphs(self) -> tuple[dict[str, nnx.GraphDef], nnx.GraphDef, dict[str, nnx.Variable]]:
        """(a block of each stack, what is around the stacks, each parameter's abstract variable by its name)."""
        ends, ends_state = nnx.split(nnx.eval_shape(lambda: Ends(self.config, rngs=nnx.Rngs(params=0))))
        variables = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(ends_state)}
        blocks = {}
        for name, stack in self.stacks.items():
            abstract = nnx.eval_shape(lambda stack=stack: Block(self.config, stack, rngs=nnx.Rngs(params=0)))
            blocks[name], state = nnx.split(abstract)
            variables |= {"/".join(map(str, (name, *path))): leaf for path, leaf in nnx.to_flat_state(state)}
        if self.config.quantise is not None:
            self.config.quantise.check(quantisable(variables))
        return blocks, ends, dict(sorted(variables.items()))

    @functools.cached_property
    def stacks(self) -> dict[str, Stack]:
        """The stacks of layers by name, in the order of the forward pass."""
        return {stack.name: stack for stack in stacks(self.config)}

    def init(self, key: jax.Array, *, mesh: Mesh | None = None, rules: ShardingRules | None = None) -> Params:
        """Random parameters, the same on every mesh; with a mesh, each device makes its own shard only."""
        shardings = self.shardings(mesh, rules) if mesh is not None else None
        return jax.jit(self._random, out_shardings=shardings)(key)

    def _random(self, key: jax.Array) -> Params:
        def blocks(stack: Stack, keys: jax.Array) -> Params:
            one = lambda key: nnx.to_pure_dict(nnx.state(Block(self.config, stack, rngs=nnx.Rngs(params=key))))  # noqa: E731
            return jax.vmap(one)(keys[stack.first_layer : stack.first_layer + stack.num_layers])

        ends_key, layers_key = jax.random.split(key)
        keys = jax.random.split(layers_key, self.config.num_layers)
        ends = nnx.to_pure_dict(nnx.state(Ends(self.config, rngs=nnx.Rngs(params=ends_key))))
        return {**ends, **{name: blocks(stack, keys) for name, stack in self.stacks.items()}}

    def abstract(self) -> Params:
        """Shapes and dtypes of params, as jax.ShapeDtypeStruct."""
        return unflatten_named(
            {
                name: jax.ShapeDtypeStruct(self._layered(name) + variable.shape, variable.dtype)
                for name, variable in self._graphs[2].items()
            }
        )

    def axes(self) -> Params:
        """The logical axes of params: a tuple of names for each leaf."""
        return unflatten_named(
            {
                name: ("layers",) * len(self._layered(name)) + variable.get_metadata()["axes"]
                for name, variable in self._graphs[2].items()
            }
        )

    def shardings(self, mesh: Mesh, rules: ShardingRules | None = None) -> Params:
        """Where params lie on the mesh: a NamedSharding for each leaf. Raises ConfigError where one does not divide."""
        rules, shapes = rules or self.rules, flatten_named(self.abstract())
        named = {name: rules.sharding(axes, mesh) for name, axes in flatten_named(self.axes()).items()}
        for name, sharding in named.items():
            try:
                sharding.shard_shape(shapes[name].shape)
            except ValueError as error:
                raise ConfigError(
                    f"{name} {shapes[name].shape} does not divide over the mesh {dict(mesh.shape)} as {sharding.spec}: "
                    "choose other mesh axes, or other sharding rules"
                ) from error
        return unflatten_named(named)

    @property
    def unquantised(self) -> "Model":
        """The model with all weights as arrays of param_dtype."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, quantise=None))

    def quantise_rule(self, kernel: str) -> QuantiseRule:
        """The rule of a kernel's parameters (layers/attn/q_proj/kernel), which has one."""
        rule = None if self.config.quantise is None else self.config.quantise.rule(dotted(kernel))
        assert rule is not None, kernel
        return rule

    def _layered(self, name: str) -> tuple[int, ...]:
        stack = self.stacks.get(name.partition("/")[0])
        return () if stack is None else (stack.num_layers,)

    @property
    def num_params(self) -> int:
        """Parameters of the base; tied embeddings count once, and a quantised weight's factors are none."""
        return sum(leaf.size for name, leaf in flatten_named(self.abstract()).items() if not name.endswith(SCALES))

    def sites(self) -> dict[str, SiteInfo]:
        """Where an adapter may act, in the order of the forward pass."""
        return site_infos(self.config, tuple(self.stacks.values()), self.abstract(), self.axes())

    def site_weight(self, params: Params, site: str) -> jax.Array:
        """The base weight at a site: [L, d_in, d_out], [d_in, d_out] if not layered, [L, E, d_in, d_out] at experts.

        In param_dtype; of a quantised weight, what its values and factors stand for. At "embed" it is the table [V, D].
        """
        if site == EMBED:
            return params[EMBED]["embedding"]
        return dense(stored_weight(flatten_named(params), self.weight_name(site)), self.config.param_dtype)

    def site_bias(self, params: Params, site: str) -> jax.Array | None:
        """The base's bias at a site, [L, d_out] or [d_out]; None where it has none."""
        if site == EMBED:
            return None
        return flatten_named(params).get(self.weight_name(site).removesuffix("kernel") + "bias")

    def site_arrays(self, params: Params) -> tuple[Callable[[str], jax.Array], Callable[[str], jax.Array | None]]:
        """(weight, bias) of a site by its name: `site_weight` and `site_bias` of these params."""
        return functools.partial(self.site_weight, params), functools.partial(self.site_bias, params)

    def weight_name(self, site: str) -> str:
        """The name in params of the weight at a site. Raises SiteError where no linear map is so named."""
        sites = [name for name, info in self.sites().items() if info.kind == "linear"]
        if site not in sites:
            raise SiteError(f"the model has no linear map {site!r}; its linear sites are: {', '.join(sites)}")
        return kernel_name(site)

    def with_site_weight(self, params: Params, site: str, weight: jax.Array) -> Params:
        """params with another weight at a site, of the same shape; the other leaves are shared.

        Raises SiteError where the site's weight is quantised: rounding what is added to it would lose the most of it.
        """
        flat, name = flatten_named(params), self.weight_name(site)
        old = stored_weight(flat, name)
        if isinstance(old, Quantised):
            raise SiteError(f"the weight at {site} is quantised, and takes no other: load the base without quantise")
        if weight.shape != old.shape:
            raise SiteError(f"the weight at {site} has shape {old.shape}; it cannot become {weight.shape}")
        return unflatten_named({**flat, name: weight.astype(old.dtype)})

    def embed(self, params: Params, tokens_BxT: jax.Array) -> jax.Array:
        """Rows of the embedding table, [B, T, D] in the compute dtype."""
        return self._ends(params).embed(tokens_BxT, self.config.dtype, self.rules)

    def hidden(
        self, params: Params, tokens_BxT: jax.Array, **options: Unpack[ForwardOptions]
    ) -> tuple[jax.Array, Cache | None]:
        """(hidden states after the last norm [B, T, D], the cache with these tokens written): part of `forward`."""
        return self.forward(params, tokens_BxT, **options)[:2]

    def batch_hidden(self, params: Params, batch: Batch, **options: Unpack[ForwardOptions]) -> jax.Array:
        """The hidden states of a batch's packed rows [B, T, D]: part of `forward`."""
        options["positions_BxT"], options["segments_BxT"] = batch.positions_BxT, batch.segments_BxT
        return self.hidden(params, batch.tokens_BxT, **options)[0]

    def forward(
        self,
        params: Params,
        tokens_BxT: jax.Array,
        *,
        positions_BxT: jax.Array | None = None,
        segments_BxT: jax.Array | None = None,
        cache: Cache | None = None,
        adapt: Adapt = NO_ADAPT,
        remat: Remat = "none",
        embedded_BxTxD: jax.Array | None = None,
        routes_BxTxLxK: jax.Array | None = None,
        record_routes: bool = False,
    ) -> tuple[jax.Array, Cache | None, jax.Array | None]:
        """(hidden states after the last norm [B, T, D], the cache with these tokens written, the tokens' routes).

        positions_BxT: int32, default 0..T-1; -1 is padding. segments_BxT: int32, for packed rows; a token sees its own
        segment only, and 0 is padding. With a cache a token is written at its position and sees positions 0..its own;
        a token at -1, or past the cache's end, is not written. A prompt's virtual tokens (popax.modeling.virtual) are
        tokens like any where there is a cache; without one `forward` puts them before the rows itself. remat: what the
        backward pass computes again instead of keeping it (popax.modeling.remat). embedded_BxTxD: used in place of the
        tokens' embeddings, for gradients with respect to them. routes_BxTxLxK: the experts of each token in each
        mixture, in place of the routers' choice, except where NOT_RECORDED; their weights stay the routers' own.
        record_routes: return the experts that the tokens went to, int16 [B, T, L, K], else None; a model without
        mixtures has none either. On an ambient mesh whose axes the rule "sequence" names, rows are cut along their
        tokens. Raises ConfigError for segments together with a cache, for routes of another shape than `routes_shape`,
        for a number of tokens that such a mesh does not divide, and where virtual tokens leave a row no room.
        """
        batch, length = tokens_BxT.shape
        if cache is not None and segments_BxT is not None:
            raise ConfigError("segments are for packed rows without a cache: give each segment a row of its own")
        if routes_BxTxLxK is not None and routes_BxTxLxK.shape != (wanted := (batch, length, *self.routes_shape)):
            raise ConfigError(
                f"routes have shape {routes_BxTxLxK.shape}, the model takes {wanted}: pack them for it (pack_rollouts)"
            )
        if positions_BxT is None:
            positions_BxT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
        if segments_BxT is None:
            segments_BxT = (positions_BxT >= 0).astype(jnp.int32)
        ahead = adapt.virtual_tokens if cache is None and embedded_BxTxD is None else 0
        if ahead:
            check_room(self.config, length, ahead)
            own_B = adapt.outer.has_virtual(batch)
            tokens_BxT, positions_BxT, segments_BxT, routes_BxTxLxK = placed(
                tokens_BxT, positions_BxT, segments_BxT, routes_BxTxLxK, ahead, own_B
            )
        seen = Seen()  # a paged cache has its own
        if isinstance(cache, KVCache | LatentCache):
            seen = Seen(mask_BxTxS=cache_mask(positions_BxT, cache.length))
        elif cache is None:
            seen = Seen.in_segments(segments_BxT)
        rope = cos_sin(self.config, positions_BxT)
        x_BxTxD = self._embedded(params, tokens_BxT, adapt) if embedded_BxTxD is None else embedded_BxTxD
        context = Context(rope=rope, seen=seen, positions_BxT=positions_BxT, rules=self.rules)
        routes_LxBxTxK = None if routes_BxTxLxK is None else jnp.moveaxis(routes_BxTxLxK, 2, 0)
        taken_LxBxTxK = None
        for name, stack in self.stacks.items():
            layers = (self._graphs[0][name], params[name], getattr(adapt, name))
            options = {"first_layer": stack.first_layer, "remat": remat, "record": record_routes}
            options["routes_LxBxTxK"] = routes_LxBxTxK if stack.routed else None
            x_BxTxD, cache, taken_LxBxTxK = scan_blocks(*layers, x_BxTxD, context, cache, **options)
        taken_BxTxLxK = None if taken_LxBxTxK is None else jnp.moveaxis(taken_LxBxTxK, 0, 2)[:, ahead:]
        return self._ends(params).final_norm(x_BxTxD[:, ahead:]), cache, taken_BxTxLxK

    def _embedded(self, params: Params, tokens_BxT: jax.Array, adapt: Adapt) -> jax.Array:
        if not adapt.outer.adapts(EMBED):
            return self.embed(params, tokens_BxT)
        return adapt.outer.embedded(self.embed(params, jnp.maximum(tokens_BxT, 0)), tokens_BxT)

    @property
    def routes_shape(self) -> tuple[int, int]:
        """(mixtures in the model, experts of a token): what a token's record holds; (0, 0) without mixtures."""
        moe = self.config.moe
        return (0, 0) if moe is None else (self.config.num_layers - moe.first_dense_layers, moe.experts_per_token)

    def logits(self, params: Params, x: jax.Array, adapt: Adapt = NO_ADAPT) -> jax.Array:
        """Hidden states [..., D] to float32 logits [..., V]."""
        return self._ends(params).logits(x, adapt.outer).astype(jnp.float32)

    def token_nll(
        self, params: Params, x: jax.Array, targets: jax.Array, adapt: Adapt = NO_ADAPT, *, frozen: bool = True
    ) -> jax.Array:
        """-log p(target) in nats: hidden states [..., D] and targets [...] to [...] float32.

        frozen: the head is not trained, so its logits need not exist; NotImplementedError where a gradient with respect
        to it is asked for nevertheless. A head that an adapter acts on is each user's own, and has its logits.
        """
        return self._ends(params).token_nll(x, targets, adapt.outer, self.rules, frozen=frozen)

    def __call__(self, params: Params, tokens_BxT: jax.Array, **options: Unpack[ForwardOptions]) -> jax.Array:
        """float32 logits [B, T, V]; the arguments are those of `forward`."""
        x_BxTxD, _ = self.hidden(params, tokens_BxT, **options)
        return self.logits(params, x_BxTxD, options.get("adapt", NO_ADAPT))

    def _ends(self, params: Params) -> Any:
        return nnx.merge(self._graphs[1], {name: leaf for name, leaf in params.items() if name not in self.stacks})
