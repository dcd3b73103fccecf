"""The model as pure functions: structure, packing, sites, vmap, placement."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.errors import ConfigError, SiteError
from popax.modeling.digest import digest_params
from popax.modeling.model import Model
from popax.sharding import ShardingRules
from popax.trees import flatten_named
from popax.types import NO_ADAPT, ExpertFactors, ExpertTerms

CLOSE = {"rtol": 0, "atol": 1e-5}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shift:
    """An Adapt that adds a number of its own at some sites, to see what the model calls where."""

    virtual_tokens = 0
    amounts: dict[str, jax.Array]  # site -> [L] at the layers' sites, [] elsewhere

    @property
    def dense_layers(self) -> "Shift":
        return self._starting_with("dense_layers.")

    @property
    def layers(self) -> "Shift":
        return self._starting_with("layers.")

    @property
    def outer(self) -> "Shift":
        return self._starting_with(("lm_head", "embed"))

    def _starting_with(self, prefix: str | tuple[str, ...]) -> "Shift":
        return Shift({site: amount for site, amount in self.amounts.items() if site.startswith(prefix)})

    def adapts(self, site):
        return site in self.amounts

    def hidden(self, site, x_BxTxD, positions_BxT, cache):
        del positions_BxT
        return (self(x_BxTxD, {site: x_BxTxD})[site] if self.adapts(site) else x_BxTxD), cache

    def embedded(self, x_BxTxD, tokens_BxT):
        del tokens_BxT
        return self._shifted("embed", x_BxTxD)

    def expert_terms(self, x_BxTxD, sites):
        """Features of rank 1 that are the amount, or nothing, and factors of ones."""
        given = [site in self.amounts for site in sites]
        if not any(given):
            return None
        lows = [
            jnp.broadcast_to(self.amounts[site], (*x_BxTxD.shape[:2], 1)) if has else None
            for site, has in zip(sites[:2], given[:2], strict=True)
        ]
        ones = [jnp.ones((1, 8, 1, 16)) if has else None for has in given]  # as many and as wide as in every family
        factors = ExpertFactors(gate=ones[0], up=ones[1], down=ones[2], in_order=True)
        return ExpertTerms(jnp.zeros(x_BxTxD.shape[:2], jnp.int32), *lows, factors)

    def after_experts(self, site, low_BxTxR, y_BxTxD):
        return y_BxTxD + self.amounts[site] * low_BxTxR

    def __call__(self, x, ys):
        assert all(x.shape[:-1] == y.shape[:-1] for y in ys.values())
        return {site: self._shifted(site, y) for site, y in ys.items()}

    def _shifted(self, site, y):
        if site not in self.amounts:
            return y
        # A different number for each feature: a router would not notice the same for all.
        ramp = jnp.linspace(0.5, 1.5, y.shape[-1], dtype=y.dtype) * self.amounts[site].astype(y.dtype)
        return y + jnp.broadcast_to(ramp, y.shape)


def test_params_abstract_and_axes_agree(family):
    params = flatten_named(family.params)
    abstract, axes = flatten_named(family.model.abstract()), flatten_named(family.model.axes())
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in params.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in abstract.items()
    }
    assert {name: len(names) for name, names in axes.items()} == {name: leaf.ndim for name, leaf in params.items()}
    stacked = ("layers/", "dense_layers/")
    assert all((names[0] == "layers") == name.startswith(stacked) for name, names in axes.items())
    assert family.model.num_params == sum(leaf.size for leaf in params.values())


def test_axes_are_the_interface_that_shardings_are_written_for(tiny):
    assert flatten_named(tiny.model.axes()) == {
        "embed/embedding": ("vocab", "embed"),
        "final_norm/scale": ("norm",),
        "layers/attn/k_norm/scale": ("layers", "norm"),
        "layers/attn/k_proj/kernel": ("layers", "embed", "kv_heads"),
        "layers/attn/o_proj/kernel": ("layers", "heads", "embed"),
        "layers/attn/q_norm/scale": ("layers", "norm"),
        "layers/attn/q_proj/kernel": ("layers", "embed", "heads"),
        "layers/attn/v_proj/kernel": ("layers", "embed", "kv_heads"),
        "layers/attn_norm/scale": ("layers", "norm"),
        "layers/mlp/down_proj/kernel": ("layers", "ffw", "embed"),
        "layers/mlp/gate_proj/kernel": ("layers", "embed", "ffw"),
        "layers/mlp/up_proj/kernel": ("layers", "embed", "ffw"),
        "layers/mlp_norm/scale": ("layers", "norm"),
        "lm_head/kernel": ("embed", "vocab"),
    }


def test_equal_configs_share_compiled_programs(tiny):
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def forward(model, params, tokens):
        traces.append(model)
        return model(params, tokens)

    forward(tiny.model, tiny.params, tiny.tokens(1, 4))
    forward(Model(dataclasses.replace(tiny.config)), tiny.params, tiny.tokens(1, 4))
    assert len(traces) == 1


def test_random_weights_start_near_a_uniform_prediction(family):
    logits = family.forward(family.params, family.tokens(2, 12))
    assert logits.dtype == jnp.float32
    assert 0.0 < np.std(logits) < 0.5


def test_a_mesh_changes_where_parameters_lie_and_nothing_else(tiny, mesh):
    spread = tiny.model.init(jax.random.key(0), mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, tiny.params, spread)
    kernel = spread["layers"]["mlp"]["down_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 24, 8)
    tokens = tiny.tokens(2, 12)
    np.testing.assert_allclose(tiny.forward(spread, tokens), tiny.forward(tiny.params, tokens), **CLOSE)


def test_a_mesh_that_does_not_divide_a_parameter_is_refused(tiny, mesh):
    odd = Model(dataclasses.replace(tiny.config, ffw_dim=49))
    with pytest.raises(ConfigError, match=r"layers/mlp/down_proj/kernel \(3, 49, 32\) does not divide"):
        odd.shardings(mesh)
    whole = ShardingRules(rules=tuple((axis, None) for axis, _ in ShardingRules().rules))
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(odd.shardings(mesh, whole)))


def test_a_token_sees_only_the_past(tiny):
    tokens = tiny.tokens(2, 12)
    before = tiny.forward(tiny.params, tokens)
    after = tiny.forward(tiny.params, tokens.at[0, 6].set((tokens[0, 6] + 1) % 64))
    np.testing.assert_array_equal(before[1], after[1])
    np.testing.assert_array_equal(before[0, :6], after[0, :6])
    assert np.abs(before[0, 6:] - after[0, 6:]).max(-1).min() > 0


def test_packed_segments_equal_rows_of_their_own(family):
    first, second = family.tokens(2, 12, seed=1)
    packed = jnp.concatenate([first[:5], second[:4], jnp.zeros(3, jnp.int32)])[None]
    segments = jnp.asarray([[1] * 5 + [2] * 4 + [0] * 3], jnp.int32)
    positions = jnp.asarray([[*range(5), *range(4), 0, 0, 0]], jnp.int32)
    logits = family.forward(family.params, packed, positions_BxT=positions, segments_BxT=segments)
    alone = family.forward(family.params, jnp.stack([first, second]))
    np.testing.assert_allclose(logits[0, :5], alone[0, :5], **CLOSE)
    np.testing.assert_allclose(logits[0, 5:9], alone[1, :4], **CLOSE)
    assert np.isfinite(logits).all()


def test_positions_of_minus_one_are_padding_on_either_side(tiny):
    tokens = tiny.tokens(1, 12)
    alone = tiny.forward(tiny.params, tokens)
    padded = jnp.concatenate([jnp.zeros((1, 3), jnp.int32), tokens, jnp.zeros((1, 2), jnp.int32)], axis=1)
    positions = jnp.asarray([[-1, -1, -1, *range(12), -1, -1]], jnp.int32)
    logits = tiny.forward(tiny.params, padded, positions_BxT=positions)
    np.testing.assert_allclose(logits[:, 3:15], alone, **CLOSE)


def test_bfloat16_stays_close_to_float32(tiny):
    half = Model(dataclasses.replace(tiny.config, dtype="bfloat16", param_dtype="bfloat16"))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.params)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    tokens = tiny.tokens(2, 12)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.abstract())} == {jnp.dtype("bfloat16")}
    logits = jax.jit(half)(params, tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, tiny.forward(wide, tokens), rtol=0, atol=0.03)


def test_embedded_input_replaces_the_lookup(tiny):
    tokens = tiny.tokens(2, 12)

    @jax.jit
    def both(params):
        given = tiny.model.embed(params, tokens)
        plain, _ = tiny.model.hidden(params, tokens)
        return plain, tiny.model.hidden(params, jnp.zeros_like(tokens), embedded_BxTxD=given)[0]

    np.testing.assert_allclose(*both(tiny.params), **CLOSE)


def test_every_site_is_called_in_every_layer(family):
    tokens, sites = family.tokens(2, 12), family.model.sites()
    zeros = {name: jnp.zeros((info.layers,) if info.layers else ()) for name, info in sites.items()}
    base = family.forward(family.params, tokens)
    np.testing.assert_allclose(family.forward(family.params, tokens, adapt=Shift(zeros)), base, **CLOSE)
    for name, info in sites.items():
        outputs = [
            family.forward(family.params, tokens, adapt=Shift(zeros | {name: zeros[name].at[at].set(0.5)}))
            for at in (range(info.layers) if info.layers else [...])
        ]
        moved = [float(np.abs(np.asarray(output - base)).max()) for output in outputs]
        assert min(moved) > 1e-3, name
        assert len({digest_params({"logits": output}) for output in outputs}) == len(outputs), name


def test_the_head_is_a_site_where_it_is_not_tied(tiny):
    x = jnp.ones((2, 32))
    shift = Shift({"lm_head": jnp.float32(0.5)})
    base = tiny.model.logits(tiny.params, x)
    ramp = np.linspace(0.25, 0.75, 64, dtype=np.float32)[None]
    np.testing.assert_allclose(tiny.model.logits(tiny.params, x, shift), base + ramp, **CLOSE)
    assert list(tiny.model.sites())[-1] == "lm_head"
    assert "lm_head" not in Model(dataclasses.replace(tiny.config, tied_embeddings=True)).sites()


def test_vmap_over_users_keeps_the_base_unbatched(tiny):
    tokens = tiny.tokens(4, 2, 12)
    amounts = jnp.linspace(0.0, 1.0, 4)[:, None] * jnp.ones((4, 3))

    def one(amount, tokens):
        return tiny.model(tiny.params, tokens, adapt=Shift({"layers.attn.q_proj": amount}))

    lowered = jax.jit(jax.vmap(one)).lower(amounts, tokens)
    # One product of [N, B, T, D] with the [D, F] weight, not N products.
    assert "tensor<4x2x12x32xf32>, tensor<32x48xf32>" in lowered.as_text()
    together, alone = lowered.compile()(amounts, tokens), jax.jit(one)
    for user in range(4):
        np.testing.assert_allclose(together[user], alone(amounts[user], tokens[user]), **CLOSE)


def test_site_weights_are_read_and_replaced(tiny):
    before, tokens = digest_params(tiny.params), tiny.tokens(2, 12)
    base = tiny.forward(tiny.params, tokens)
    linear = {name: info for name, info in tiny.model.sites().items() if info.kind == "linear"}
    for name, info in linear.items():
        weight = tiny.model.site_weight(tiny.params, name)
        assert weight.shape == ((info.layers,) if info.layers else ()) + (info.d_in, info.d_out)
        merged = tiny.model.with_site_weight(tiny.params, name, weight + 1)
        np.testing.assert_array_equal(tiny.model.site_weight(merged, name), weight + 1)
        assert jax.tree.structure(merged) == jax.tree.structure(tiny.params)
        assert not np.array_equal(tiny.forward(merged, tokens), base), name
    assert digest_params(tiny.params) == before  # invariant 9
    with pytest.raises(SiteError, match=r"layers\.attn\.qkv_proj.*its linear sites are: layers\.attn\.q_proj"):
        tiny.model.site_weight(tiny.params, "layers.attn.qkv_proj")
    with pytest.raises(SiteError, match=r"\(3, 32, 32\); it cannot become \(3, 32, 31\)"):
        tiny.model.with_site_weight(tiny.params, "layers.attn.q_proj", jnp.zeros((3, 32, 31)))


def test_what_a_block_hands_on_is_a_site_without_a_weight(tiny):
    info = tiny.model.sites()["layers.out"]
    assert (info.kind, info.d_in, info.d_out, info.layers) == ("hidden", 32, 32, 3)
    with pytest.raises(SiteError, match=r"no linear map 'layers\.out'"):
        tiny.model.site_weight(tiny.params, "layers.out")


def test_no_adapt_is_bitwise_the_model_without_one(family):
    tokens = family.tokens(2, 12)
    plain = family.forward(family.params, tokens)
    np.testing.assert_array_equal(family.forward(family.params, tokens, adapt=NO_ADAPT), plain)  # invariant 4
