"""One user's low-rank op and its vmap door, against float64 sums and autodiff of the dense formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popax.kernels.stacked_lora import lora, reference
from popax.kernels.stacked_lora.arg_specs import ARG_SPECS
from popax.trees import member

SHAPES = st.tuples(*(st.integers(1, top) for top in (5, 9, 12, 12, 6)))  # N, T, D, F, R
DTYPES = st.sampled_from([("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])  # x, factors


def _operands(lora_math, seed, shape, dtypes):
    n, t, d, f, r = shape
    x_dtype, factor_dtype = dtypes
    x = lora_math.normal(seed, (n, t, d), x_dtype)
    a, b = lora_math.normal(seed + 1, (n, r, d), factor_dtype), lora_math.normal(seed + 2, (n, r, f), factor_dtype)
    return x, a, b, jnp.abs(lora_math.normal(seed + 3, (n,))), lora_math.normal(seed + 4, (n, t, f), x_dtype)


@jax.jit
def _value_and_vjp(x, a, b, scale, g):
    delta, pullback = jax.vjp(jax.vmap(lora), x, a, b, scale)
    return delta, pullback(g)


@given(shape=SHAPES, dtypes=DTYPES, seed=st.integers(0, 99))
@settings(max_examples=9, deadline=None)
def test_forward_and_vjp_are_the_oracles(lora_math, shape, dtypes, seed):
    x, a, b, scale, g = _operands(lora_math, seed, shape, dtypes)
    delta, gradients = _value_and_vjp(x, a, b, scale, g)
    assert delta.dtype == x.dtype
    assert [gradient.dtype for gradient in gradients] == [x.dtype, a.dtype, b.dtype, scale.dtype]
    terms = sum(shape[1:]) * 2
    for user in range(shape[0]):
        one = [np.asarray(each[user], np.float64) for each in (x, a, b, scale)]
        sizes = [np.abs(each) for each in one]
        lora_math.assert_close(delta[user], lora_math.delta(*one), lora_math.delta(*sizes), dtypes[0], terms)
        g_one = np.asarray(g[user], np.float64)
        want, bound = lora_math.vjp(g_one, *one), lora_math.vjp(np.abs(g_one), *sizes)
        for got, true, magnitude in zip(gradients, want, bound, strict=True):
            lora_math.assert_close(got[user], true, magnitude, dtypes[0], terms + shape[1] * shape[3])


@given(shape=SHAPES, seed=st.integers(0, 99))
@settings(max_examples=5, deadline=None)
def test_vjp_is_autodiff_of_the_dense_formula(lora_math, shape, seed):
    x, a, b, scale, g = _operands(lora_math, seed, shape, ("float32", "float32"))

    def dense(x, a, b, scale):
        w_delta_DxF = scale * jnp.sum(a[:, :, None] * b[:, None, :], axis=0)
        return jnp.matmul(x, w_delta_DxF)

    want = jax.jit(lambda operands, g: jax.vjp(jax.vmap(dense), *operands)[1](g))((x, a, b, scale), g)
    _, got = _value_and_vjp(x, a, b, scale, g)
    for each, true in zip(got, want, strict=True):
        np.testing.assert_allclose(each, true, rtol=2e-5, atol=2e-5 * max(1.0, float(jnp.max(jnp.abs(true)))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
def test_leading_axes_are_tokens(lora_math, leading, dtype):
    x, a, b = lora_math.normal(0, (*leading, 5), dtype), lora_math.normal(1, (2, 5)), lora_math.normal(2, (2, 7))
    delta = lora(x, a, b, jnp.float32(0.5))
    assert (delta.shape, delta.dtype) == ((*leading, 7), x.dtype)
    flat = lora(x.reshape(-1, 5), a, b, jnp.float32(0.5))
    np.testing.assert_array_equal(np.asarray(delta, np.float32).reshape(-1, 7), np.asarray(flat, np.float32))


def test_vmap_is_a_loop_over_users(lora_math):
    """Invariant 1, for the op: a member of the population == that member alone."""
    x, a, b, scale, g = _operands(lora_math, 7, (4, 6, 8, 10, 3), ("float32", "float32"))
    together, pullback = jax.vjp(jax.vmap(lora), x, a, b, scale)
    gradients = pullback(g)
    for user in range(4):
        alone, pull_alone = jax.vjp(lora, x[user], a[user], b[user], scale[user])
        np.testing.assert_allclose(together[user], alone, rtol=1e-6, atol=1e-6)
        for got, want in zip(gradients, pull_alone(g[user]), strict=True):
            np.testing.assert_allclose(got[user], want, rtol=1e-5, atol=1e-6)


def _loss(x, a, b, scale):
    return jnp.sum(lora(x, a, b, scale) ** 2)


def test_vmap_of_grad_calls_each_stacked_op_once(lora_math):
    """No loop over users, no grouped product: two batched products forward and four backward, whatever N is."""
    n = 16
    x, a, b, scale, _ = _operands(lora_math, 1, (n, 4, 8, 8, 2), ("float32", "float32"))
    step = jax.vmap(jax.grad(_loss, argnums=(0, 1, 2)))
    counts = lora_math.primitives(jax.make_jaxpr(step)(x, a, b, scale).jaxpr)
    assert counts["dot_general"] == 6
    assert not {name for name in counts if name in ("while", "scan", "cond") or "ragged" in name}
    text = jax.jit(step).lower(x, a, b, scale).as_text()
    assert text.count("stablehlo.dot_general") == 6
    assert "while" not in text
    assert "ragged" not in text
    assert all("batching_dims = [0]" in line for line in text.splitlines() if "stablehlo.dot_general" in line)


def test_vmap_of_grad_inside_a_layer_scan(lora_math):
    """The only loops are the layers' own: one forward, one backward."""
    layers, users = 3, 4
    a, b = lora_math.normal(1, (users, layers, 2, 8)), lora_math.normal(2, (users, layers, 2, 8))
    x, scale = lora_math.normal(0, (users, 5, 8)), jnp.full((layers,), 0.5)

    def loss(factors, x, scan):
        def layer(h, operands):
            return h + lora(h, *operands), None

        h, _ = scan(layer, x, (*factors, scale))
        return jnp.sum(h**2)

    def unrolled(layer, carry, operands):
        for index in range(layers):
            carry, _ = layer(carry, member(operands, index))
        return carry, None

    step = jax.vmap(jax.grad(lambda factors, x: loss(factors, x, jax.lax.scan)))
    counts = lora_math.primitives(jax.make_jaxpr(step)((a, b), x).jaxpr)
    assert counts["scan"] == 2
    assert counts["dot_general"] == 6
    together = step((a, b), x)
    for user in range(users):
        want = jax.grad(lambda factors, x: loss(factors, x, unrolled))((a[user], b[user]), x[user])
        for got, true in zip(together, want, strict=True):
            np.testing.assert_allclose(got[user], true, rtol=1e-4, atol=1e-4)


def test_unbatched_operands_are_everybodys(lora_math):
    x, a, b, scale, _ = _operands(lora_math, 3, (4, 5, 6, 7, 2), ("float32", "float32"))
    shared_x = jax.vmap(lora, in_axes=(None, 0, 0, None))(x[0], a, b, scale[0])
    gradient = jax.vmap(jax.grad(_loss, argnums=(0, 1, 3)), in_axes=(None, 0, None, None))(x[0], a, b[0], scale[0])
    for user in range(4):
        np.testing.assert_allclose(shared_x[user], lora(x[0], a[user], b[user], scale[0]), rtol=1e-6, atol=1e-6)
        want = jax.grad(_loss, argnums=(0, 1, 3))(x[0], a[user], b[0], scale[0])
        for got, true in zip(gradient, want, strict=True):
            np.testing.assert_allclose(got[user], true, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_shared_operand_is_the_users_sum(lora_math):
    x, a, b, scale, _ = _operands(lora_math, 4, (3, 5, 6, 7, 2), ("float32", "float32"))
    total = lambda shared: jnp.sum(jax.vmap(_loss, in_axes=(0, None, 0, 0))(x, shared, b, scale))  # noqa: E731
    want = sum(jax.grad(_loss, argnums=1)(x[user], a[0], b[user], scale[user]) for user in range(3))
    np.testing.assert_allclose(jax.grad(total)(a[0]), want, rtol=1e-5, atol=1e-5)


def test_vmap_nests(lora_math):
    """Users of several cohorts, or several learning rates of one user."""
    x, a, b, scale, _ = _operands(lora_math, 5, (6, 4, 8, 8, 2), ("float32", "float32"))
    split = lambda leaf: leaf.reshape(2, 3, *leaf.shape[1:])  # noqa: E731
    step = jax.vmap(jax.grad(_loss, argnums=(1, 2)))
    nested = jax.vmap(step)(*map(split, (x, a, b, scale)))
    flat = step(x, a, b, scale)
    for got, want in zip(nested, flat, strict=True):
        np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-6, atol=1e-6)


def test_users_do_not_meet(lora_math):
    """Invariant 2: user 1's loss has exactly zero gradient at everybody else's adapter; a NaN stays where it is."""
    x, a, b, scale, _ = _operands(lora_math, 6, (4, 5, 6, 7, 2), ("float32", "float32"))
    da, db = jax.grad(lambda a, b: jnp.sum(jax.vmap(lora)(x, a, b, scale)[1] ** 2), argnums=(0, 1))(a, b)
    others = np.array([0, 2, 3])
    assert not np.any(np.asarray(da)[others])
    assert not np.any(np.asarray(db)[others])
    assert np.any(np.asarray(da)[1])
    step = jax.vmap(jax.grad(_loss, argnums=(1, 2)))
    clean, poisoned = step(x, a, b, scale), step(x.at[1].set(jnp.nan), a, b, scale)
    for before, after in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(np.asarray(before)[others], np.asarray(after)[others])


def test_spmd_axis_name_reaches_through_the_door(lora_math):
    """Over a population axis of 4 devices: the same numbers, and no collective (invariant 10)."""
    mesh = jax.make_mesh((4,), ("population",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("population"))
    operands = _operands(lora_math, 8, (8, 4, 8, 8, 2), ("float32", "float32"))[:4]
    step = jax.jit(jax.vmap(jax.grad(_loss, argnums=(1, 2)), spmd_axis_name="population"))
    sharded = jax.device_put(operands, sharding)
    hlo = step.lower(*sharded).compile().as_text()
    assert not any(word in hlo for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))
    for got, want in zip(step(*sharded), step(*operands), strict=True):
        np.testing.assert_array_equal(got, want)


def test_named_specs_trace():
    """Every named shape is one the op takes."""
    for spec in ARG_SPECS:
        shapes = (
            (spec.population, spec.tokens, spec.d_in),
            (spec.population, spec.rank, spec.d_in),
            (spec.population, spec.rank, spec.d_out),
            (spec.population,),
        )
        operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        delta, h = jax.eval_shape(reference.forward, *operands)
        assert delta.shape == (spec.population, spec.tokens, spec.d_out)
        assert h.shape == (spec.population, spec.rank, spec.tokens)
