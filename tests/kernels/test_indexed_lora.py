"""The indexed op against float64 sums per group, over how popular the slots are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popax.kernels.indexed_lora import indexed_lora, take_slots
from popax.kernels.indexed_lora.arg_specs import DECODE_SPECS, GROUPED_SPECS
from popax.kernels.stacked_lora import lora

SHAPES = st.tuples(*(st.integers(1, top) for top in (8, 5, 6, 10, 10, 4)))  # G, T, S, D, F, R
POPULARITY = ("distinct", "uniform", "zipf", "identical")


def _slots(popularity, groups, slots, seed, base_only):
    rng = np.random.default_rng(seed)
    draw = {
        "distinct": lambda: np.resize(rng.permutation(slots), groups),
        "uniform": lambda: rng.integers(0, slots, groups),
        "zipf": lambda: np.minimum(rng.zipf(1.5, groups) - 1, slots - 1),
        "identical": lambda: np.full(groups, rng.integers(0, slots)),
    }[popularity]()
    return jnp.asarray(np.where(rng.random(groups) < base_only, -1, draw), jnp.int32)


@jax.jit
def _value_and_vjp(x, a, b, scale, slot, g):
    delta, pullback = jax.vjp(lambda *operands: indexed_lora(*operands, slot), x, a, b, scale)
    return delta, pullback(g)


@pytest.mark.parametrize("popularity", POPULARITY)
@given(shape=SHAPES, dtype=st.sampled_from(["float32", "bfloat16"]), seed=st.integers(0, 99))
@settings(max_examples=5, deadline=None)
def test_forward_and_vjp_are_the_oracles(lora_math, popularity, shape, dtype, seed):
    g_count, t, s, d, f, r = shape
    x, g = lora_math.normal(seed, (g_count, t, d), dtype), lora_math.normal(seed + 1, (g_count, t, f), dtype)
    a, b = lora_math.normal(seed + 2, (s, r, d), dtype), lora_math.normal(seed + 3, (s, r, f), dtype)
    slot, scale = _slots(popularity, g_count, s, seed, base_only=0.3), jnp.float32(0.75)

    delta, (dx, da, db, ds) = _value_and_vjp(x, a, b, scale, slot, g)
    assert [each.dtype for each in (delta, dx, da, db, ds)] == [x.dtype] * 2 + [a.dtype, b.dtype, scale.dtype]

    terms = 2 * (t + d + f + r) + g_count * t * f
    want = {"a": np.zeros(a.shape), "b": np.zeros(b.shape), "s": 0.0}
    magnitude = {"a": np.zeros(a.shape), "b": np.zeros(b.shape), "s": 0.0}
    for group, index in enumerate(np.asarray(slot)):
        if index < 0:
            assert not np.any(np.asarray(delta[group], np.float32))
            assert not np.any(np.asarray(dx[group], np.float32))
            continue
        one = [np.asarray(each, np.float64) for each in (x[group], a[index], b[index], scale)]
        cotangent, sizes = np.asarray(g[group], np.float64), [np.abs(each) for each in one]
        lora_math.assert_close(delta[group], lora_math.delta(*one), lora_math.delta(*sizes), dtype, terms)
        own, bound = lora_math.vjp(cotangent, *one), lora_math.vjp(np.abs(cotangent), *sizes)
        lora_math.assert_close(dx[group], own[0], bound[0], dtype, terms)
        for sums, parts in ((want, own), (magnitude, bound)):
            sums["a"][index] += parts[1]
            sums["b"][index] += parts[2]
            sums["s"] += parts[3]
    # Groups that share a slot are added in the factor's dtype: one more rounding a group.
    repeats = 1 if dtype == "float32" else 1 + g_count / 6
    for got, name in ((da, "a"), (db, "b"), (ds, "s")):
        lora_math.assert_close(got, want[name], magnitude[name] * repeats, dtype, terms)


def test_is_the_stacked_op_where_every_group_has_its_own_slot(lora_math):
    x, a, b = lora_math.normal(0, (5, 3, 8)), lora_math.normal(1, (5, 2, 8)), lora_math.normal(2, (5, 2, 6))
    order = jnp.asarray([3, 0, 4, 1, 2])
    stacked = jax.vmap(lora, in_axes=(0, 0, 0, None))(x, a[order], b[order], jnp.float32(2.0))
    np.testing.assert_allclose(indexed_lora(x, a, b, jnp.float32(2.0), order), stacked, rtol=1e-6, atol=1e-6)


def test_rows_without_an_adapter_and_others_nans_do_not_meet(lora_math):
    """Invariant 2: a NaN in one user's adapter or activations reaches neither base-only rows nor other slots."""
    x, a, b = lora_math.normal(0, (3, 2, 8)), lora_math.normal(1, (2, 2, 8)), lora_math.normal(2, (2, 2, 6))
    a, x = a.at[0].set(jnp.nan), x.at[2].set(jnp.inf)
    slot = jnp.asarray([-1, 1, -1])

    def loss(x, a, b):
        delta = indexed_lora(x, a, b, jnp.float32(1.0), slot)
        return jnp.sum(jnp.where((slot >= 0)[:, None, None], delta, 0.0) ** 2), delta

    (dx, da, db), delta = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, a, b)
    assert not np.any(np.asarray(delta[0]))
    assert not np.any(np.asarray(dx[0]))
    assert not np.any(np.asarray(da[0]))
    assert not np.any(np.asarray(db[0]))
    assert np.all(np.isfinite(da))
    assert np.all(np.isfinite(db))
    assert np.any(np.asarray(da[1]))


def test_a_slot_beyond_the_pool_is_nobodys(lora_math):
    leaf = lora_math.normal(0, (3, 4))
    taken = np.asarray(take_slots(leaf, jnp.asarray([2, 3, -1, 99, -2])))
    np.testing.assert_array_equal(taken[0], leaf[2])
    assert not np.any(taken[1:])


def test_cost_follows_tokens_not_slots():
    """64 slots cost the FLOPs of one: the products are over groups."""

    def flops(slots):
        shapes = ((4, 2, 16), (slots, 2, 16), (slots, 2, 16), ())
        operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        jitted = jax.jit(lambda *operands: indexed_lora(*operands, jnp.arange(4, dtype=jnp.int32)))
        analysis = jitted.lower(*operands).compile().cost_analysis()
        return analysis["flops"]

    assert flops(64) <= 1.05 * flops(4)


def test_named_specs_trace():
    for spec in DECODE_SPECS:
        for d_out in spec.d_outs:
            shapes = (spec.slots, spec.rank, spec.d_in), (spec.slots, spec.rank, d_out)
            assert _traced(spec.tokens, 1, spec.d_in, *shapes) == (spec.tokens, 1, d_out)
    for spec in GROUPED_SPECS:
        shapes = (spec.slots, spec.rank, spec.d_in), (spec.slots, spec.rank, spec.d_out)
        tokens = spec.tokens // spec.runs
        assert _traced(spec.runs, tokens, spec.d_in, *shapes) == (spec.runs, tokens, spec.d_out)


def _traced(groups, tokens, d_in, *factors):
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((groups, tokens, d_in), *factors, ())]
    return jax.eval_shape(indexed_lora, *operands, jax.ShapeDtypeStruct((groups,), jnp.int32)).shape
