"""The model as pure functions: structure, packing, cache, vmap, sites, placement."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.errors import ConfigError, SiteError
from popax.modeling.cache import init_cache
from popax.modeling.config import ModelConfig
from popax.modeling.digest import digest_params
from popax.modeling.model import Model
from popax.sharding import ShardingRules
from popax.trees import flatten_named
from popax.types import NO_ADAPT

CLOSE = {"rtol": 0, "atol": 1e-5}


def tokens_of(config: ModelConfig, *shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, shape), jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shift:
    """An Adapt that adds its own number at one site, to see what the model calls where."""

    amount: jax.Array  # [L] under `layers`, [] at the outer sites
    site: str = dataclasses.field(metadata={"static": True})

    @property
    def layers(self) -> "Shift":
        return self

    @property
    def outer(self) -> "Shift":
        return self

    def __call__(self, site, x, y):
        return y + jnp.broadcast_to(self.amount.astype(y.dtype), y.shape) if site == self.site else y


def test_params_abstract_and_axes_agree(config, key):
    model = Model(config)
    params = flatten_named(model.init(key))
    abstract, axes = flatten_named(model.abstract()), flatten_named(model.axes())
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in params.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in abstract.items()
    }
    assert {name: len(names) for name, names in axes.items()} == {name: leaf.ndim for name, leaf in params.items()}
    assert all((names[0] == "layers") == name.startswith("layers/") for name, names in axes.items())
    assert model.num_params == sum(leaf.size for leaf in params.values())


def test_axes_are_the_interface_that_shardings_are_written_for(tiny):
    assert flatten_named(Model(tiny).axes()) == {
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


def test_equal_configs_share_compiled_programs(tiny, key):
    params, tokens = Model(tiny).init(key), tokens_of(tiny, 1, 4)
    traces = []

    def forward(model, params, tokens):
        traces.append(model)
        return model(params, tokens)

    compiled = jax.jit(forward, static_argnums=0)
    compiled(Model(tiny), params, tokens)
    compiled(Model(dataclasses.replace(tiny)), params, tokens)
    assert len(traces) == 1


def test_random_weights_start_near_a_uniform_prediction(config, key):
    model = Model(config)
    logits = model(model.init(key), tokens_of(config, 2, 8))
    assert logits.dtype == jnp.float32
    assert float(jnp.std(logits)) < 0.5


def test_a_mesh_changes_where_parameters_lie_and_nothing_else(config, mesh, key):
    model = Model(config)
    alone, spread = model.init(key), model.init(key, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, alone, spread)
    kernel = spread["layers"]["mlp"]["down_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 24, 8)
    tokens = tokens_of(config, 2, 8)
    np.testing.assert_allclose(jax.jit(model)(spread, tokens), jax.jit(model)(alone, tokens), **CLOSE)


def test_a_mesh_that_does_not_divide_a_parameter_is_refused(tiny, mesh, key):
    odd = dataclasses.replace(tiny, ffw_dim=49)
    with pytest.raises(ConfigError, match=r"layers/mlp/down_proj/kernel \(3, 49, 32\) does not divide"):
        Model(odd).init(key, mesh=mesh)
    whole = ShardingRules(rules=tuple((axis, None) for axis, _ in ShardingRules().rules))
    assert Model(odd).init(key, mesh=mesh, rules=whole)["final_norm"]["scale"].is_fully_replicated


def test_a_token_sees_only_the_past(config, key):
    model, tokens = Model(config), tokens_of(config, 1, 9)
    params = model.init(key)
    changed = tokens.at[0, 6].add(1)
    before, after = model(params, tokens), model(params, changed)
    np.testing.assert_array_equal(before[0, :6], after[0, :6])
    assert not np.allclose(before[0, 6:], after[0, 6:])


def test_packed_segments_equal_rows_of_their_own(config, key):
    model = Model(config)
    params = model.init(key)
    first, second = tokens_of(config, 1, 5, seed=1), tokens_of(config, 1, 4, seed=2)
    packed = jnp.concatenate([first, second, jnp.zeros((1, 3), jnp.int32)], axis=1)
    segments = jnp.asarray([[1] * 5 + [2] * 4 + [0] * 3], jnp.int32)
    positions = jnp.asarray([[*range(5), *range(4), 0, 0, 0]], jnp.int32)
    logits = model(params, packed, positions_BxT=positions, segments_BxT=segments)
    np.testing.assert_allclose(logits[:, :5], model(params, first), **CLOSE)
    np.testing.assert_allclose(logits[:, 5:9], model(params, second), **CLOSE)
    assert np.isfinite(logits).all()


def test_ragged_prefill_and_decode_through_the_cache_equal_the_full_forward(config, key):
    model = Model(config)
    params, tokens = model.init(key), tokens_of(config, 3, 12)
    lengths = jnp.asarray([3, 7, 5], jnp.int32)
    full = model(params, tokens)
    column = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (3, 8))
    positions = jnp.where(column < lengths[:, None], column, -1)
    step = jax.jit(lambda tokens, positions, cache: model.hidden(params, tokens, positions_BxT=positions, cache=cache))
    x, cache = step(tokens[:, :8], positions, init_cache(config, 3, 12))
    logits = model.logits(params, x)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], full[row, :length], **CLOSE)
    for offset in range(5):
        position = (lengths + offset)[:, None]
        x, cache = step(jnp.take_along_axis(tokens, position, axis=1), position, cache)
        expected = jnp.take_along_axis(full, position[..., None], axis=1)
        np.testing.assert_allclose(model.logits(params, x), expected, **CLOSE)


def test_padding_and_positions_past_the_end_write_nothing(tiny, key):
    model = Model(tiny)
    params, tokens = model.init(key), tokens_of(tiny, 1, 3)
    _, cache = model.hidden(params, tokens, cache=init_cache(tiny, 1, 3))
    for position in (-1, 3, 100):
        at = jnp.full((1, 3), position, jnp.int32)
        _, after = model.hidden(params, tokens, positions_BxT=at, cache=cache)
        jax.tree.map(np.testing.assert_array_equal, cache, after)


def test_a_cache_may_be_bfloat16_and_takes_no_segments(tiny, key):
    model, tokens = Model(tiny), tokens_of(tiny, 1, 3)
    params, cache = model.init(key), init_cache(tiny, 1, 4, "bfloat16")
    x, cache = model.hidden(params, tokens, cache=cache)
    assert (x.dtype, cache.k.dtype) == (jnp.float32, jnp.bfloat16)
    with pytest.raises(ConfigError, match="segments"):
        model.hidden(params, tokens, segments_BxT=tokens, cache=cache)
    with pytest.raises(ConfigError, match="int8"):
        init_cache(tiny, 1, 4, "int8")


def test_bfloat16_stays_close_to_float32(tiny, key):
    half = dataclasses.replace(tiny, dtype="bfloat16", param_dtype="bfloat16")
    params = Model(half).init(key)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    tokens = tokens_of(tiny, 2, 8)
    wide = Model(tiny)(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), tokens)
    np.testing.assert_allclose(Model(half)(params, tokens), wide, rtol=0, atol=0.03)


def test_remat_changes_no_gradient(config, key):
    model, tokens = Model(config), tokens_of(config, 2, 6)
    params = model.init(key)

    def loss(params, remat):
        return jnp.sum(jnp.square(model(params, tokens, remat=remat)))

    kept, again = (jax.jit(jax.grad(loss), static_argnums=1)(params, remat) for remat in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), kept, again)


def test_embedded_input_replaces_the_lookup(tiny, key):
    model, tokens = Model(tiny), tokens_of(tiny, 2, 6)
    params = model.init(key)
    plain, _ = model.hidden(params, tokens)
    given, _ = model.hidden(params, jnp.zeros_like(tokens), embedded_BxTxD=model.embed(params, tokens))
    np.testing.assert_array_equal(plain, given)


def test_every_site_is_called_in_its_layer(config, key):
    model, tokens = Model(config), tokens_of(config, 1, 5)
    params = model.init(key)
    base = model(params, tokens)
    for name, info in model.sites().items():
        shape = (info.layers,) if info.layers else ()
        seen = model(params, tokens, adapt=Shift(jnp.zeros(shape), name)) if info.layers else base
        np.testing.assert_array_equal(seen, base)  # invariant 4: an adapter that adds nothing is the base
        if info.layers:
            shifted = [
                model(params, tokens, adapt=Shift(jnp.zeros(shape).at[layer].set(0.5), name))
                for layer in range(info.layers)
            ]
            distinct = {digest_params({"logits": logits}) for logits in shifted}
            # A constant added to k is no change before the softmax only without RoPE and norms.
            assert len(distinct) == info.layers, name


def test_the_head_is_a_site_where_it_is_not_tied(tiny, key):
    model = Model(tiny)
    params, x = model.init(key), jnp.ones((2, 32))
    shift = Shift(jnp.float32(0.5), "lm_head")
    np.testing.assert_allclose(model.logits(params, x, shift), model.logits(params, x) + 0.5, **CLOSE)
    assert list(model.sites())[-1] == "lm_head"
    assert "lm_head" not in Model(dataclasses.replace(tiny, tied_embeddings=True)).sites()


def test_vmap_over_users_keeps_the_base_unbatched(tiny, key):
    model = Model(tiny)
    params, tokens = model.init(key), tokens_of(tiny, 4, 2, 6)
    amounts = jnp.linspace(0.0, 1.0, 4)[:, None] * jnp.ones((4, tiny.num_layers))

    def one(amount, tokens):
        return model(params, tokens, adapt=Shift(amount, "layers.attn.q_proj"))

    together = jax.jit(jax.vmap(one))(amounts, tokens)
    alone = jnp.stack([one(amount, row) for amount, row in zip(amounts, tokens, strict=True)])
    np.testing.assert_allclose(together, alone, **CLOSE)
    # One product of [N, B, T, D] with the [D, F] weight, not N products.
    text = jax.jit(jax.vmap(one)).lower(amounts, tokens).as_text()
    assert "tensor<4x2x6x32xf32>, tensor<32x48xf32>" in text


def test_site_weights_are_read_and_replaced(config, key):
    model, tokens = Model(config), tokens_of(config, 1, 5)
    params = model.init(key)
    before = digest_params(params)
    for name, info in model.sites().items():
        weight = model.site_weight(params, name)
        assert weight.shape == ((info.layers,) if info.layers else ()) + (info.d_in, info.d_out)
        merged = model.with_site_weight(params, name, 2 * weight)
        np.testing.assert_array_equal(model.site_weight(merged, name), 2 * weight)
        assert jax.tree.structure(merged) == jax.tree.structure(params)
        assert not np.array_equal(model(merged, tokens), model(params, tokens))
    assert digest_params(params) == before  # invariant 9
    with pytest.raises(SiteError, match=r"layers\.attn\.qkv_proj.*its sites are: layers\.attn\.q_proj"):
        model.site_weight(params, "layers.attn.qkv_proj")
    with pytest.raises(SiteError, match=r"\(3, 32, 32\); it cannot become \(3, 32, 31\)"):
        model.with_site_weight(params, "layers.attn.q_proj", jnp.zeros((3, 32, 31)))


def test_no_adapt_is_bitwise_the_model_without_one(config, key):
    model, tokens = Model(config), tokens_of(config, 2, 5)
    params = model.init(key)
    np.testing.assert_array_equal(
        jax.jit(model)(params, tokens), jax.jit(lambda p, t: model(p, t, adapt=NO_ADAPT))(params, tokens)
    )
