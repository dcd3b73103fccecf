"""One user's core in a shared basis, its vmap door and the indexed form, against autodiff of the dense formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popax.kernels import target
from popax.kernels.shared_core import indexed_shared_core, shared_core

CORES = ("matrix", "diagonal")
ROADS = ("cpu", "tpu")  # as it stands in XLA; through the kernels' door, where nothing here is tuned and XLA answers


@pytest.fixture(params=ROADS)
def road(request, monkeypatch):
    monkeypatch.setattr(target, "platform", lambda: request.param)
    return request.param


def _operands(lora_math, seed, shape, core, dtypes=("float32", "float32")):
    n, t, d, f, r = shape
    x, y = lora_math.normal(seed, (n, t, d), dtypes[0]), lora_math.normal(seed + 4, (n, t, f), dtypes[0])
    a, b = lora_math.normal(seed + 1, (r, d), dtypes[1]), lora_math.normal(seed + 2, (r, f), dtypes[1])
    cores = lora_math.normal(seed + 3, (n, r, r) if core == "matrix" else (n, r), dtypes[1])
    return x, a, b, cores, jnp.linspace(0.5, 2.0, n, dtype=jnp.float32), y


def _dense(x_TxD, a_RxD, b_RxF, core, scale, y_TxF):
    h_TxR = x_TxD @ a_RxD.T
    mixed_TxR = h_TxR @ core.T if core.ndim == 2 else jnp.einsum("tr,r->tr", h_TxR, core)
    return y_TxF + scale * mixed_TxR @ b_RxF


IN_AXES = (0, None, None, 0, 0, 0)


@given(
    shape=st.tuples(*(st.integers(1, top) for top in (4, 9, 12, 12, 6))),
    core=st.sampled_from(CORES),
    with_y=st.booleans(),
    seed=st.integers(0, 99),
    road=st.sampled_from(ROADS),
)
@settings(max_examples=8, deadline=None)
def test_value_and_vjp_are_the_dense_formulas(lora_math, shape, core, with_y, seed, road):
    x, a, b, cores, scale, y = _operands(lora_math, seed, shape, core)
    g = lora_math.normal(seed + 9, y.shape)
    y = y if with_y else jnp.zeros_like(y)

    def pulled(one_user):
        many = jax.vmap(one_user, in_axes=IN_AXES)
        out, pullback = jax.vjp(lambda x, cores, scale, y: many(x, a, b, cores, scale, y), x, cores, scale, y)
        return out, *pullback(g)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "platform", lambda: road)
        got = jax.jit(lambda: pulled(lambda *each: shared_core(*each[:5], each[5] if with_y else None)))()
    want = jax.jit(lambda: pulled(_dense))()
    for index, (each, true) in enumerate(zip(got, want, strict=True)):
        true = jnp.zeros_like(true) if index == 4 and not with_y else true
        np.testing.assert_allclose(each, true, rtol=2e-5, atol=2e-5 * max(1.0, float(jnp.max(jnp.abs(true)))))


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.parametrize("core", CORES)
def test_leading_axes_are_tokens_and_dtypes_may_differ(lora_math, core, leading, dtypes):
    _, a, b, cores, _, _ = _operands(lora_math, 0, (1, 1, 5, 7, 2), core, dtypes)
    x, y = lora_math.normal(5, (*leading, 5), dtypes[0]), lora_math.normal(6, (*leading, 7), dtypes[1])
    scale = jnp.float32(0.5)
    delta, total = shared_core(x, a, b, cores[0], scale), shared_core(x, a, b, cores[0], scale, y)
    assert (delta.shape, delta.dtype, total.shape, total.dtype) == (y.shape, x.dtype, y.shape, y.dtype)
    flat = shared_core(x.reshape(-1, 5), a, b, cores[0], scale)
    np.testing.assert_array_equal(np.asarray(delta, np.float32).reshape(-1, 7), np.asarray(flat, np.float32))


def _loss(core, x, a, b, scale, y):
    return jnp.sum(jnp.sin(shared_core(x, a, b, core, scale, y)))


LOSS_AXES = (0, 0, None, None, 0, 0)


def _shapes(jaxpr) -> set:
    """Of every value that a jaxpr makes, those inside calls included."""
    found = {var.aval.shape for eqn in jaxpr.eqns for var in eqn.outvars}
    for eqn in jaxpr.eqns:
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            found |= _shapes(inner) if hasattr(inner, "eqns") else set()
    return found


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("nested", [False, True])
def test_the_basis_is_one_copy_for_all_users(lora_math, core, nested, road):
    """No value of the shape [users, R, D] or [users, R, F], in one vmap over users and in cohorts of them."""
    x, a, b, cores, scale, y = _operands(lora_math, 1, (6, 4, 16, 24, 3), core)
    step, operands = jax.vmap(jax.grad(_loss), in_axes=LOSS_AXES), (cores, x, a, b, scale, y)
    flat = step(*operands)
    if nested:
        split = lambda leaf: leaf.reshape(2, 3, *leaf.shape[1:])  # noqa: E731
        operands = tuple(each if at in (2, 3) else split(each) for at, each in enumerate(operands))
        step = jax.vmap(step, in_axes=LOSS_AXES)
    closed = jax.make_jaxpr(step)(*operands)
    copies = {(*users, 3, width) for users in ((6,), (2,), (3,), (2, 3)) for width in (16, 24)}
    assert not copies & _shapes(closed.jaxpr)
    counts = lora_math.primitives(closed.jaxpr)
    assert not {"while", "scan", "cond"} & set(counts)
    # The door: two products with the basis forward, two backward and the core's gradient; a matrix has three more of
    # its own. As it stands, nobody asked for a gradient in x.
    assert (
        counts["dot_general"] == {"tpu": {"matrix": 8, "diagonal": 5}, "cpu": {"matrix": 5, "diagonal": 3}}[road][core]
    )
    np.testing.assert_allclose(step(*operands).reshape(flat.shape), flat, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("road")
def test_a_vmap_over_layers_scans_and_a_vmap_over_bases_is_plain(lora_math):
    x, a, b, cores, scale, y = _operands(lora_math, 2, (3, 4, 5, 5, 2), "matrix")
    bases = [jnp.stack([each, 2 * each, -each]) for each in (a, b)]
    together = jax.vmap(shared_core)(x, *bases, cores, scale, y)
    only_a = jax.vmap(jax.vmap(shared_core, in_axes=IN_AXES), in_axes=(None, 0, None, None, None, None))(
        x, bases[0], b, cores, scale, y
    )
    for at in range(3):
        alone = shared_core(x[at], bases[0][at], bases[1][at], cores[at], scale[at], y[at])
        np.testing.assert_allclose(together[at], alone, rtol=1e-6, atol=1e-6)
        want = jax.vmap(shared_core, in_axes=IN_AXES)(x, bases[0][at], b, cores, scale, y)
        np.testing.assert_allclose(only_a[at], want, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("road")
def test_population_of_layer_scans_with_rematerialisation(lora_math):
    """The basis of each layer is scanned, the users' cores are vmapped: values are the loop's."""
    layers, users = 2, 3
    a, b = lora_math.normal(0, (layers, 2, 5)), lora_math.normal(1, (layers, 2, 5))
    cores, x = lora_math.normal(2, (users, layers, 2, 2)), lora_math.normal(3, (users, 4, 5))

    def loss(cores, x, one):
        @jax.checkpoint
        def layer(h, operands):
            core, a, b = operands
            return one(h, a, b, core, jnp.float32(0.3), h), None

        return jnp.sum(jax.lax.scan(layer, x, (cores, a, b))[0] ** 2)

    got, want = (
        jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, 0, None)), static_argnums=2)(cores, x, one)
        for one in (shared_core, _dense)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.usefixtures("road")
def test_a_derivative_by_the_basis_is_refused_by_name(lora_math, core):
    x, a, b, cores, scale, y = _operands(lora_math, 3, (2, 3, 4, 5, 2), core)
    slot = jnp.asarray([1, -1], jnp.int32)

    def stacked(a, b):
        return jnp.sum(jax.vmap(shared_core, in_axes=IN_AXES)(x, a, b, cores, scale, y))

    def indexed(a, b):
        return jnp.sum(indexed_shared_core(x, a, b, cores, scale[0], slot, y))

    for loss in (stacked, indexed):
        with pytest.raises(TypeError, match=r"^a: the shared basis of shared_core is frozen"):
            jax.grad(loss)(a, b)
        with pytest.raises(TypeError, match=r"^a and b: the shared basis"):
            jax.jit(jax.grad(loss, argnums=(0, 1)))(a, b)
        stopped = jax.grad(lambda a, loss=loss: loss(jax.lax.stop_gradient(a), b))(a)
        np.testing.assert_array_equal(stopped, 0.0)


@pytest.mark.usefixtures("road")
def test_users_do_not_meet(lora_math):
    """User 1's loss has exactly zero gradient at everybody else's core; a NaN stays where it is, bitwise."""
    x, a, b, cores, scale, y = _operands(lora_math, 4, (4, 5, 6, 7, 2), "matrix")
    others = np.array([0, 2, 3])
    dcore = jax.grad(lambda cores: jnp.sum(jax.vmap(shared_core, in_axes=IN_AXES)(x, a, b, cores, scale, y)[1]))(cores)
    assert not np.any(np.asarray(dcore)[others])
    assert np.any(np.asarray(dcore)[1])
    step = jax.vmap(jax.grad(_loss), in_axes=LOSS_AXES)
    clean, poisoned = step(cores, x, a, b, scale, y), step(cores, x.at[1].set(jnp.nan), a, b, scale, y)
    np.testing.assert_array_equal(np.asarray(clean)[others], np.asarray(poisoned)[others])


@pytest.mark.usefixtures("road")
def test_spmd_axis_name_reaches_through_the_door(lora_math):
    """Over a population axis of 4 devices: the same numbers, and no collective (invariant 10)."""
    mesh = jax.make_mesh((4,), ("population",))
    x, a, b, cores, scale, y = _operands(lora_math, 5, (8, 4, 8, 8, 2), "matrix")
    specs = [jax.sharding.PartitionSpec(*(() if axis is None else ("population",))) for axis in LOSS_AXES]
    operands = (cores, x, a, b, scale, y)
    sharded = [
        jax.device_put(each, jax.sharding.NamedSharding(mesh, spec)) for each, spec in zip(operands, specs, strict=True)
    ]
    step = jax.jit(jax.vmap(jax.grad(_loss), in_axes=LOSS_AXES, spmd_axis_name="population"))
    hlo = step.lower(*sharded).compile().as_text()
    assert not any(word in hlo for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))
    np.testing.assert_allclose(step(*sharded), step(*operands), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("core", CORES)
def test_the_accelerators_road_is_the_cpus(lora_math, monkeypatch, core, tokens):
    """Values and gradients, ranks that differ and hold NaN beyond; slot -1 gives y's very bytes, -0 included."""
    x, a, b, cores, _, y = _operands(lora_math, 6, (6, tokens, 5, 7, 3), core)
    y = y.at[1].set(-0.0)
    slot, ranks = jnp.asarray([0, -1, 3, 3, 9, 1], jnp.int32), jnp.asarray([3, 1, 3, 2, 0, 3], jnp.int32)
    dead = jnp.arange(3)[None] >= ranks[:, None]
    dead = dead[:, :, None] | dead[:, None] if core == "matrix" else dead
    cores, g = jnp.where(dead, jnp.nan, cores), lora_math.normal(7, y.shape)

    def value_and_gradients():
        call = lambda x, core, s, y: indexed_shared_core(x, a, b, core, s, slot, y, ranks)  # noqa: E731
        out, pullback = jax.vjp(call, x, cores, jnp.float32(0.5), y)
        return out, *pullback(g)

    want = value_and_gradients()
    monkeypatch.setattr(target, "platform", lambda: "tpu")
    got = value_and_gradients()
    for each, true in zip(got, want, strict=True):
        np.testing.assert_allclose(each, true, rtol=1e-5, atol=1e-5)
    for out in (got[0], want[0]):
        assert np.asarray(out[1]).tobytes() == np.asarray(y[1]).tobytes()
    for row, owner, live in ((0, 0, 3), (2, 3, 2), (5, 1, 1)):
        own = cores[owner][(slice(live),) * (cores.ndim - 1)]
        dense = _dense(x[row], a[:live], b[:live], own, jnp.float32(0.5), y[row])
        np.testing.assert_allclose(got[0][row], dense, rtol=1e-5, atol=1e-5)
    assert not np.any(np.asarray(got[2])[np.asarray(dead)])
