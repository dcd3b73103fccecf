"""One user's fused op and its vmap door, against float64 sums; W frozen, W shared, W quantised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popax.kernels.fused_lora import fused_lora, fused_lora_indexed, ops, quantize
from popax.kernels.fused_lora.arg_specs import ARG_SPECS

SHAPES = st.tuples(*(st.integers(1, top) for top in (5, 9, 12, 12, 6)))  # N, T, D, F, R
WEIGHTS = ("float32", "bfloat16", "int8", "float8_e4m3fn")


def _weight(lora_math, seed, shape, weight):
    w_DxF = lora_math.normal(seed, shape)
    return quantize.quantize(w_DxF, weight) if weight in quantize.LARGEST else (w_DxF.astype(weight), None)


def _operands(lora_math, seed, shape, weight="float32", dtype="float32"):
    n, t, d, f, r = shape
    w, w_scale = _weight(lora_math, seed, (d, f), weight)
    x, a, b = (
        lora_math.normal(seed + 1 + at, each, dtype) for at, each in enumerate(((n, t, d), (n, r, d), (n, r, f)))
    )
    return x, w, a, b, jnp.abs(lora_math.normal(seed + 5, (n,))), w_scale, lora_math.normal(seed + 6, (n, t, f), dtype)


def _population(x, w, a, b, scale, w_scale):
    return jax.vmap(lambda x, a, b, scale: fused_lora(x, w, a, b, scale, w_scale))(x, a, b, scale)


@jax.jit
def _value_and_vjp(x, w, a, b, scale, w_scale, g):
    out, pullback = jax.vjp(lambda *mine: _population(mine[0], w, *mine[1:], w_scale), x, a, b, scale)
    return out, pullback(g)


@given(
    shape=SHAPES,
    weight=st.sampled_from(WEIGHTS),
    dtype=st.sampled_from(("float32", "bfloat16")),
    seed=st.integers(0, 99),
)
@settings(max_examples=5, deadline=None)
def test_forward_and_vjp_against_the_sums(lora_math, shape, weight, dtype, seed):
    x, w, a, b, scale, w_scale, g = _operands(lora_math, seed, shape, weight, dtype)
    out, gradients = _value_and_vjp(x, w, a, b, scale, w_scale, g)
    assert out.dtype == x.dtype
    assert [gradient.dtype for gradient in gradients] == [x.dtype, a.dtype, b.dtype, scale.dtype]
    # What a product in x's dtype makes of W; the scales are exact in float64.
    w64 = np.asarray(w.astype(x.dtype), np.float64) * (1.0 if w_scale is None else np.asarray(w_scale, np.float64))
    terms = sum(shape[1:]) * 2 + shape[1] * shape[3]
    for user in range(shape[0]):
        one = [np.asarray(each[user], np.float64) for each in (x, a, b, scale)]
        sizes, g_one = [np.abs(each) for each in one], np.asarray(g[user], np.float64)
        want, magnitude = one[0] @ w64 + lora_math.delta(*one), sizes[0] @ np.abs(w64) + lora_math.delta(*sizes)
        lora_math.assert_close(out[user], want, magnitude, dtype, terms)
        wants, magnitudes = list(lora_math.vjp(g_one, *one)), list(lora_math.vjp(np.abs(g_one), *sizes))
        wants[0], magnitudes[0] = wants[0] + g_one @ w64.T, magnitudes[0] + np.abs(g_one) @ np.abs(w64).T
        for got, true, bound in zip(gradients, wants, magnitudes, strict=True):
            lora_math.assert_close(got[user], true, bound, dtype, terms)


@pytest.mark.parametrize("weight", ["float32", "int8"])
def test_one_stacked_call_and_the_weight_is_nobodys_copy(lora_math, weight):
    """vmap over users, and over cohorts of them: no loop, and no array of W's size with another axis before it."""
    n, d, f = 6, 24, 40
    x, w, a, b, scale, w_scale, _ = _operands(lora_math, 1, (n, 5, d, f, 2), weight)
    split = lambda leaf: leaf.reshape(2, 3, *leaf.shape[1:])  # noqa: E731

    def loss(x, a, b, scale):
        return jnp.sum(fused_lora(x, w, a, b, scale, w_scale) ** 2)

    step = jax.vmap(jax.grad(loss, argnums=(0, 1, 2, 3)))
    for call, operands in ((step, (x, a, b, scale)), (jax.vmap(step), tuple(map(split, (x, a, b, scale))))):
        jaxpr = jax.make_jaxpr(call)(*operands)
        counts = lora_math.primitives(jaxpr.jaxpr)
        assert counts["dot_general"] == 8
        assert not {name for name in counts if name in ("while", "scan", "cond")}
        text = jax.jit(call).lower(*operands).as_text()
        assert f"x{d}x{f}x" not in text
    flat, nested = step(x, a, b, scale), jax.vmap(step)(*map(split, (x, a, b, scale)))
    for user in range(n):
        alone = jax.grad(loss, argnums=(0, 1, 2, 3))(x[user], a[user], b[user], scale[user])
        for got, folded, want in zip(flat, nested, alone, strict=True):
            np.testing.assert_allclose(got[user], want, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(folded.reshape(got.shape)[user], want, rtol=1e-5, atol=1e-5)


def test_a_vmap_that_does_batch_the_weight_is_that_of_the_formula(lora_math):
    x, _, a, b, scale, _, _ = _operands(lora_math, 2, (3, 4, 6, 8, 2))
    w = lora_math.normal(9, (3, 6, 8))
    together = jax.vmap(fused_lora)(x, w, a, b, scale)
    for user in range(3):
        want = fused_lora(x[user], w[user], a[user], b[user], scale[user])
        np.testing.assert_allclose(together[user], want, rtol=1e-5, atol=1e-5)


def test_a_scan_over_layers_keeps_the_weight_unbatched(lora_math):
    layers, users = 3, 4
    w, a, b = (
        lora_math.normal(seed, shape) for seed, shape in enumerate(((layers, 8, 8), *[(users, layers, 2, 8)] * 2))
    )
    x = lora_math.normal(4, (users, 5, 8))

    def loss(factors, x):
        def layer(h, operands):
            w_DxF, a_RxD, b_RxF = operands
            return jnp.tanh(fused_lora(h, w_DxF, a_RxD, b_RxF, jnp.float32(0.5))), None

        return jnp.sum(jax.lax.scan(layer, x, (w, *factors))[0] ** 2)

    def plain(factors, x):
        for w_DxF, a_RxD, b_RxF in zip(w, *factors, strict=True):
            x = jnp.tanh(x @ (w_DxF + 0.5 * a_RxD.T @ b_RxF))
        return jnp.sum(x**2)

    step = jax.vmap(jax.grad(loss))
    assert lora_math.primitives(jax.make_jaxpr(step)((a, b), x).jaxpr)["scan"] == 2
    for got, want in zip(step((a, b), x), jax.vmap(jax.grad(plain))((a, b), x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("leading", [(), (3,), (2, 1, 3)])
def test_leading_axes_are_tokens(lora_math, leading):
    x, w = lora_math.normal(0, (*leading, 5)), lora_math.normal(1, (5, 7))
    a, b = lora_math.normal(2, (2, 5)), lora_math.normal(3, (2, 7))
    out = fused_lora(x, w, a, b, jnp.float32(0.5))
    assert out.shape == (*leading, 7)
    np.testing.assert_allclose(out, x @ (w + 0.5 * a.T @ b), rtol=1e-5, atol=1e-5)


def test_the_derivative_by_a_frozen_weight_is_refused_by_name(lora_math):
    x, w, a, b, scale, w_scale, _ = _operands(lora_math, 3, (1, 4, 6, 8, 2), "int8")
    one = (x[0], w, a[0], b[0], scale[0])
    total = lambda *operands: jnp.sum(fused_lora(*operands))  # noqa: E731
    with pytest.raises(TypeError, match=r"^w: the base weight of fused_lora is frozen"):
        jax.grad(total, argnums=(0, 1))(one[0], w.astype(jnp.float32), *one[2:])
    with pytest.raises(TypeError, match=r"^w_scale_F: .*frozen"):
        jax.grad(total, argnums=5)(*one, w_scale)
    with pytest.raises(TypeError, match=r"^w: "):
        jax.jit(jax.vmap(jax.grad(total, argnums=1), in_axes=(0, None, 0, 0, 0)))(x, w.astype(jnp.float32), a, b, scale)
    stopped = lambda x, w: total(x, jax.lax.stop_gradient(w), *one[2:])  # noqa: E731
    assert not np.any(np.asarray(jax.grad(stopped, argnums=1)(one[0], w.astype(jnp.float32))))


def test_a_quantised_weight_without_its_scale_is_refused(lora_math):
    x, w, a, b, scale, _, _ = _operands(lora_math, 4, (1, 4, 6, 8, 2), "float8_e4m3fn")
    with pytest.raises(ValueError, match="float8_e4m3fn: pass w_scale_F"):
        fused_lora(x[0], w, a[0], b[0], scale[0])


SLOTS = {
    "distinct": [3, 0, -1, 2, 1],
    "uniform": [1, 3, 1, -1, 0],
    "zipf": [0, 0, 0, -1, 2],
    "identical": [2, 2, 2, 2, 2],
    "skewed": [-1, 1, 1, 1, 1],
}


@pytest.mark.parametrize("weight", ["float32", "int8"])
@pytest.mark.parametrize("popularity", SLOTS)
def test_rows_with_slots_are_their_users(lora_math, popularity, weight):
    """Each group is its slot's user alone; slot -1 is the base product's very bytes; W's derivative is refused."""
    x, w, a, b, scale, w_scale, g = _operands(lora_math, 6, (5, 3, 6, 8, 2), weight)
    slot = jnp.asarray(SLOTS[popularity], jnp.int32)
    loss = lambda x, a, b, w: jnp.sum(fused_lora_indexed(x, w, a, b, scale[0], slot, w_scale) * g)  # noqa: E731
    out = fused_lora_indexed(x, w, a, b, scale[0], slot, w_scale)
    dx, da, db = jax.grad(loss, argnums=(0, 1, 2))(x, a, b, w)
    base = fused_lora_indexed(x, w, a, b, scale[0], jnp.full((5,), -1, jnp.int32), w_scale)
    sums = [np.zeros(a.shape), np.zeros(b.shape)]
    for row, owner in enumerate(SLOTS[popularity]):
        if owner < 0:
            np.testing.assert_array_equal(out[row], base[row])
            continue
        alone = lambda x, a, b: fused_lora(x, w, a, b, scale[0], w_scale)  # noqa: E731
        want, pullback = jax.vjp(alone, x[row], a[owner], b[owner])
        np.testing.assert_allclose(out[row], want, rtol=1e-5, atol=1e-5)
        dx_row, *mine = pullback(g[row])
        np.testing.assert_allclose(dx[row], dx_row, rtol=1e-5, atol=1e-5)
        for total, part in zip(sums, mine, strict=True):
            total[owner] += np.asarray(part)
    for got, want in zip((da, db), sums, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="base weight of fused_lora is frozen"):
        jax.grad(loss, argnums=3)(x, a, b, w.astype(jnp.float32))


def test_users_do_not_meet(lora_math):
    """Invariant 2: a user's NaN is in nobody else's result or gradient, bitwise."""
    x, w, a, b, scale, w_scale, g = _operands(lora_math, 5, (4, 5, 6, 7, 2))
    others = np.array([0, 2, 3])
    clean = jax.tree.leaves(_value_and_vjp(x, w, a, b, scale, w_scale, g))
    poisoned = jax.tree.leaves(_value_and_vjp(x.at[1].set(jnp.nan), w, a, b, scale, w_scale, g))
    for before, after in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(np.asarray(before)[others], np.asarray(after)[others])
    assert np.isnan(np.asarray(poisoned[0])[1]).all()


@given(shape=st.sampled_from(((1, 1), (3, 5), (30, 9))), seed=st.integers(0, 99), exponent=st.integers(-12, 12))
@settings(max_examples=20, deadline=None)
@pytest.mark.parametrize("dtype", quantize.LARGEST)
def test_quantisation_error_is_bounded_in_closed_form(shape, seed, exponent, dtype):
    """A column's largest entry is kept; another is off by half a step of the grid at its place."""
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(2.0**exponent)
    w[:, 0] *= shape[0] > 3
    q, scale = quantize.quantize(jnp.asarray(w), dtype)
    assert (q.dtype, scale.dtype, scale.shape) == (jnp.dtype(dtype), jnp.float32, shape[1:])
    got, largest = np.asarray(quantize.dequantize(q, scale), np.float64), np.abs(w).max(axis=0).astype(np.float64)
    error = np.abs(got - w)
    # The float32 division and product add at most a few roundings of the entry.
    rounding = 4 * 2.0**-24 * np.abs(w)
    if dtype == "int8":
        bound = np.broadcast_to(largest / 127 / 2, shape)
    else:
        bound = np.maximum(np.abs(w) * 2.0**-4, largest / 448 * 2.0**-10)
    assert np.all(error <= bound * (1 + 1e-6) + rounding)
    np.testing.assert_allclose(np.abs(got).max(axis=0), largest, rtol=1e-6)
    assert np.all(np.asarray(scale)[largest == 0] == 1.0)


def test_another_dtype_is_no_quantisation():
    with pytest.raises(ValueError, match="'int4': weights are stored as int8 or float8_e4m3fn"):
        quantize.quantize(jnp.ones((2, 2)), "int4")


def test_named_specs_trace_and_cost_their_products():
    assert len({spec.name for spec in ARG_SPECS}) == len(ARG_SPECS)
    for spec in ARG_SPECS:
        for op in ops.OPS:
            operands = op.operands(spec, jnp.bfloat16)
            first, *_ = jax.eval_shape(op.implementations["xla"], *operands)
            columns = spec.d_out if op is ops.FORWARD else spec.d_in
            assert first.shape == (spec.population, spec.tokens, columns)
            products = spec.population * spec.tokens * spec.d_in * spec.d_out
            assert op.cost(spec, jnp.bfloat16).flops > 2 * products
            assert op.cost(spec, jnp.bfloat16).bytes > sum(each.size * each.dtype.itemsize for each in operands[:2])


@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_examples_are_the_operands_and_rivals_mean_the_same(op, weight):
    spec = ARG_SPECS[0]._replace(population=2, tokens=8, d_in=16, d_out=24, rank=3, weight=weight)
    example = op.example(spec, jnp.float32, 0)
    for made, named in zip(example, op.operands(spec, jnp.float32), strict=True):
        assert (made is None) == (named is None)
        assert made is None or (made.shape, made.dtype) == (named.shape, named.dtype)
    want = jax.tree.map(jnp.shape, jax.eval_shape(op.implementations["xla"], *example))
    for rival in op.rivals.values():
        assert jax.tree.map(jnp.shape, jax.eval_shape(rival, *example)) == want
