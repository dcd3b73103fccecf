"""Quantised weights: the error of rounding in closed form, products and gradients against the dense ones, memory."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from popax.errors import ConfigError, SiteError
from popax.modeling import expert_parallel
from popax.modeling.config import ModelConfig
from popax.modeling.experts import Choice, ExpertWeights, Values
from popax.modeling.grouped import grouped_product, grouped_product_back
from popax.modeling.model import Model
from popax.modeling.quantise_rules import QuantiseRule, QuantiseRules, as_rules
from popax.modeling.quantised import Quantised, contract, dense, round_weight, stored_weight
from popax.modeling.routed import routed_experts
from popax.sharding import ShardingRules
from popax.trees import flatten_named, unflatten_named
from popax.types import ExpertFactors
from tests.modeling.conftest import CONFIGS

RULES = {
    "int8": QuantiseRule(dtype="int8"),
    "int8 in groups": QuantiseRule(dtype="int8", group=8),
    "fp8": QuantiseRule(dtype="fp8"),
    "int4": QuantiseRule(dtype="int4", group=8),
    "int4 by channel": QuantiseRule(dtype="int4"),
}
A, B, E = 32, 16, 4


def weight(*lead: int, seed: int = 0) -> np.ndarray:
    """Columns of very different sizes, one of them zero."""
    rng = np.random.default_rng(seed)
    columns = np.exp(rng.normal(0, 3, (*lead, 1, B))).astype(np.float32)
    columns[..., 0] = 0
    return rng.normal(size=(*lead, A, B)).astype(np.float32) * columns


def mesh_of(axes: dict[str, int]):
    return jax.set_mesh(Mesh(np.array(jax.devices()).reshape(*axes.values()), tuple(axes)))


def dequantised(quantised: Quantised) -> np.ndarray:
    """q s in float64, factor by factor."""
    values, scales = (np.asarray(leaf).astype(np.float64) for leaf in quantised)
    return values * np.repeat(scales, A // scales.shape[-2], axis=-2)


@pytest.fixture(params=RULES)
def rule(request) -> QuantiseRule:
    return RULES[request.param]


def test_rounding_is_to_the_nearest_value(rule):
    w = weight(3)
    rounded = round_weight(w, rule, np)
    spread = np.repeat(rounded.scales, A // rounded.scales.shape[-2], axis=-2).astype(np.float64)
    error = np.abs(dequantised(rounded) - w)
    if rule.dtype == "fp8":
        # Three bits behind the leading one, half of the last; below 2^-6 numbers are 2^-9 apart.
        assert (error <= np.maximum(np.abs(w) * 2.0**-4, spread * 2.0**-10) * (1 + 1e-6)).all()
    else:
        assert (error <= spread / 2 * (1 + 1e-6)).all()
    assert (error[..., 0] == 0).all()
    assert rounded.scales.shape == (3, 1 if rule.group is None else A // rule.group, B)
    assert np.isfinite(dequantised(rounded)).all()


def test_host_and_device_round_alike(rule):
    w = weight(3)
    ours, theirs = round_weight(w, rule, np), jax.jit(lambda w: round_weight(w, rule))(w)
    np.testing.assert_array_equal(ours.scales, theirs.scales)
    np.testing.assert_array_equal(ours.values.astype(np.float32), np.asarray(theirs.values).astype(np.float32))


def test_a_product_and_its_gradient_are_those_of_the_dense_weight(rule):
    rounded = jax.tree.map(jnp.asarray, round_weight(weight(), rule, np))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, A)), jnp.float32)
    exact = dequantised(rounded)
    y, pull = jax.vjp(lambda x: contract(x, rounded), x)
    dy = jnp.cos(y)
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ exact, rtol=2e-5, atol=1e-5 * np.abs(exact).max())
    np.testing.assert_allclose(pull(dy)[0], np.asarray(dy) @ exact.T, rtol=2e-5, atol=1e-5 * np.abs(exact).max())
    np.testing.assert_allclose(dense(rounded, jnp.float32), exact, rtol=1e-6)
    # Users are further rows of the same product, to the bit.
    np.testing.assert_array_equal(jax.vmap(lambda x: contract(x, rounded))(x), y)
    assert contract(x.astype(jnp.bfloat16), rounded).dtype == jnp.bfloat16


@pytest.mark.parametrize("sizes", [(3, 0, 6, 2), (0, 0, 11, 0)])
def test_grouped_products_are_those_of_dense_experts(rule, sizes):
    rounded = jax.tree.map(jnp.asarray, round_weight(weight(E), rule, np))
    exact = np.repeat(dequantised(rounded), sizes, axis=0)
    for form, line, width in ((grouped_product, "ra,rab->rb", A), (grouped_product_back, "rb,rab->ra", B)):
        rows = np.random.default_rng(2).normal(size=(11, width)).astype(np.float32)
        wanted = np.einsum(line, rows, exact)
        found = form(jnp.asarray(rows), rounded, jnp.asarray(sizes, jnp.int32))
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("rule", ["int8", "int4"], indirect=True)
@pytest.mark.parametrize("axes", [{}, {"expert": 2, "fsdp": 2, "tensor": 2}])
def test_quantised_experts_are_dense_experts_with_adapters_too(rule, axes):
    experts = [weight(E, seed=seed) / 100 for seed in range(2)] + [weight(E, seed=2).swapaxes(1, 2) / 100]
    rounded = ExpertWeights(*(jax.tree.map(jnp.asarray, round_weight(w, rule, np)) for w in experts))
    whole = ExpertWeights(*(dense(w, jnp.float32) for w in rounded))
    rng = np.random.default_rng(3)
    x, score = (jnp.asarray(rng.normal(size=(2, 6, width)), jnp.float32) for width in (A, 2))
    chosen = jnp.asarray(np.stack([rng.permuted(np.arange(E))[:2] for _ in range(12)]).reshape(2, 6, 2), jnp.int32)

    low, factor = (jnp.asarray(rng.normal(size=shape) / 100, jnp.float32) for shape in ((2, 6, 2), (2, 1, E, 2, B)))
    values, factors = Values(x, score, low, low), ExpertFactors(gate=factor, up=factor, down=factor, in_order=True)

    def gradients(weights):
        """Of two users with adapters on the experts."""

        def loss(values, factors, expert):
            outputs = routed_experts(values, Choice(expert, jnp.zeros((6, 1), jnp.int32)), weights, factors)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in outputs)

        return jax.jit(jax.vmap(jax.value_and_grad(loss, argnums=(0, 1))))(values, factors, chosen)

    wanted = gradients(whole)
    with mesh_of(axes) if axes else contextlib.nullcontext():
        found = gradients(rounded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), found, wanted)


def test_groups_that_a_mesh_would_cut_are_refused():
    rounded = jax.tree.map(jnp.asarray, round_weight(weight(E), QuantiseRule(dtype="int4", group=16), np))
    specs = lambda: expert_parallel.spread(ShardingRules()).weights(ExpertWeights(rounded, rounded, rounded))  # noqa: E731
    with mesh_of({"expert": 2, "fsdp": 4}), pytest.raises(ConfigError, match="2 groups"):
        specs()


def test_a_quantised_model_is_the_model_of_its_dequantised_weights():
    plain, model = Model(CONFIGS["deepseek"]), Model(dataclasses.replace(CONFIGS["deepseek"], quantise="int8"))
    params = model.init(jax.random.key(0))
    flat = flatten_named(params)
    whole = unflatten_named(
        {
            kernel: dense(stored_weight(flat, kernel), jnp.float32) if kernel.endswith("/kernel") else flat[kernel]
            for kernel in flatten_named(plain.abstract())
        }
    )
    assert model.num_params == plain.num_params
    assert model.sites() == plain.sites()
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, model.abstract())
    assert not any("embed" in leaf or "router" in leaf or "norm" in leaf for leaf in flat if leaf.endswith("/values"))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 9)), jnp.int32)
    np.testing.assert_allclose(jax.jit(model)(params, tokens), jax.jit(plain)(whole, tokens), rtol=1e-5, atol=2e-5)
    site = "layers.attn.o_proj"
    np.testing.assert_array_equal(model.site_weight(params, site), plain.site_weight(whole, site))
    with pytest.raises(SiteError, match="quantised"):
        model.with_site_weight(params, site, model.site_weight(params, site))


def test_factors_lie_beside_their_channels():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    for quantise, groups in (("int8", 1), ("int4:8", 4)):
        model = Model(dataclasses.replace(CONFIGS["qwen3"], quantise=quantise))
        shapes, places = (
            tree["layers"]["attn"]["q_proj"]["kernel"] for tree in (model.abstract(), model.shardings(mesh))
        )
        held = {part: places[part].shard_shape(shapes[part].shape) for part in shapes}
        assert held == {"values": (3, 8, 16), "scales": (3, groups, 16)}


def test_the_backward_pass_keeps_no_converted_weights():
    """Invariant of memory: without remat, a quantised base costs less than the full one, not both."""
    wide = dataclasses.replace(CONFIGS["llama"], embed_dim=256, ffw_dim=512, num_layers=4)

    def needed(config):
        model = Model(config)
        program = jax.jit(lambda params, x, t: jax.grad(lambda x: jnp.sum(model(params, t, embedded_BxTxD=x)))(x))
        x, tokens = jax.ShapeDtypeStruct((1, 8, 256), jnp.float32), jax.ShapeDtypeStruct((1, 8), jnp.int32)
        memory = program.lower(model.abstract(), x, tokens).compile().memory_analysis()
        return memory.argument_size_in_bytes, memory.temp_size_in_bytes

    (full, full_more), (less, less_more) = needed(wide), needed(dataclasses.replace(wide, quantise="int8"))
    assert less < 0.3 * full
    one_layer = full / wide.num_layers
    assert less_more < full_more + 2 * one_layer


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("int5", "int5"),
        ("int4:x", "int4:x"),
        (8, "quantise=8"),
        ({"rules": ({"dtype": "int8", "group": 0},)}, "group"),
        ({"rules": ({"dtype": "int8", "pattern": "("},)}, "regular expression"),
        ({"rules": ({"dtype": None},)}, "leave quantise out"),
    ],
)
def test_rules_that_cannot_be_are_refused(value, problem):
    with pytest.raises(ConfigError, match=problem):
        dataclasses.replace(CONFIGS["llama"], quantise=value)


def test_rules_are_tried_in_order_and_each_has_a_weight():
    shown = as_rules("int4:16")
    assert shown == QuantiseRules(rules=(QuantiseRule(dtype="int4", group=16),))
    mlp = QuantiseRule(pattern=r"layers\.mlp\..*", dtype=None)
    config = dataclasses.replace(CONFIGS["llama"], quantise=QuantiseRules(rules=(mlp, QuantiseRule(dtype="fp8"))))
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert "quantise" not in CONFIGS["llama"].to_dict()
    names = [name for name in flatten_named(Model(config).abstract()) if name.endswith("/values")]
    assert names
    assert all("/attn/" in name for name in names)
    for pattern in (r"layers\.attn\.q", r"layers\.moe\.router", r"embed\.embedding"):
        rules = QuantiseRules(rules=(QuantiseRule(dtype="int8", pattern=pattern),))
        with pytest.raises(ConfigError, match="matches no weight"):
            Model(dataclasses.replace(CONFIGS["qwen3_moe"], quantise=rules)).abstract()
    with pytest.raises(ConfigError, match="does not divide"):
        Model(dataclasses.replace(CONFIGS["llama"], quantise="int8:5")).abstract()
