"""What every row of the table promises, for every start it has; a new row is covered as it is added."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.apply import bind, bind_slots
from popax.adapters.base import ALPHA_RULES
from popax.adapters.cohort import scales
from popax.adapters.table import METHODS
from popax.trees import member
from popax.types import NO_ADAPT

pytestmark = pytest.mark.parametrize("method", METHODS)


def _equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def _close(one, other):
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6), one, other)


def _pool(adapters, cohort):
    """[L, S, ...] at layered sites, [S, ...] elsewhere."""

    def at_site(name, axis):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=axis), *(each[name] for each in adapters))

    return {name: at_site(name, 1 if spec.info.layers else 0) for name, spec in cohort.specs.items()}


def _dense_deltas(toy, cohort, adapter):
    """Each site's delta as a matrix, read off the method's own forward on unit vectors."""
    shared, dense = toy.shared(cohort), {}
    for name, spec in cohort.specs.items():
        info = spec.info
        eye, zero = jnp.eye(info.d_in), jnp.zeros((info.d_in, info.d_out))
        one = lambda state, own, scale: cohort.method.delta(state, own, scale, eye, zero, lambda x: x)  # noqa: B023, E731
        operands = (adapter[name], shared.get(name, {}), scales(spec))
        dense[name] = jax.vmap(one)(*operands) if info.layers else one(*operands)
    return dense


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_adapter_is_the_base(toy, method, dtype):
    """Invariant 4, bitwise, for the starts that claim it; the others do differ."""
    for init, identity in METHODS[method].inits.items():
        cohort = toy.cohort(method=method, init=init, dtype=dtype)
        assert cohort.starts_at_base == identity
        out = toy.op_by_op(bind(cohort, toy.init(cohort, jax.random.key(1)), toy.shared(cohort)), toy.x())
        assert bool(jnp.all(out == toy.op_by_op(NO_ADAPT, toy.x()))) == identity


@pytest.mark.parametrize("rule", ALPHA_RULES)
def test_output_is_the_merged_weights_output(toy, method, rule):
    """Invariant 4: y + delta(x) == x W', with mixed ranks and every alpha rule."""
    cohort, trained = toy.cohort(method=method, alpha_rule=rule, alpha=1.5), toy.cohort(method=method)
    adapter, shared = toy.trained(trained), toy.shared(trained)
    merged = {
        name: cohort.merge(name, weight, adapter, shared) if name in cohort.specs else weight
        for name, weight in toy.weights.items()
    }
    own = toy.run(cohort, adapter, toy.x())
    np.testing.assert_allclose(own, toy.forward(merged, NO_ADAPT, toy.x()), rtol=1e-5, atol=1e-5)
    assert float(jnp.max(jnp.abs(own - toy.base(toy.x())))) > 1e-3


def test_merge_and_norms_are_the_dense_deltas(toy, method):
    cohort = toy.cohort(method=method)
    adapter, shared = toy.trained(cohort), toy.shared(cohort)
    norms = cohort.norms(adapter, shared)
    assert set(norms) == set(cohort.specs)
    for name, dense in _dense_deltas(toy, cohort, adapter).items():
        np.testing.assert_allclose(norms[name], np.linalg.norm(dense, axis=(-2, -1)), rtol=1e-4, atol=1e-6)
        merged = cohort.merge(name, jnp.zeros_like(toy.weights[name]), adapter, shared)
        np.testing.assert_allclose(merged, dense, rtol=1e-5, atol=1e-6)
    assert float(norms["layers.mlp.up_proj"][2]) == 0.0  # the exception
    a, b = cohort.factors("lm_head", adapter, shared)
    np.testing.assert_allclose(a.T @ b * scales(cohort.specs["lm_head"]), dense, rtol=1e-5, atol=1e-6)


def test_bfloat16_adapters_apply_merge_and_measure(toy, method):
    wide, narrow = toy.cohort(method=method), toy.cohort(method=method, dtype="bfloat16")
    adapter, shared = toy.trained(wide), toy.shared(wide)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), adapter)
    back = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded)
    np.testing.assert_allclose(toy.run(narrow, rounded, toy.x()), toy.run(wide, back, toy.x()), rtol=1e-5, atol=1e-5)
    for name, norm in narrow.norms(rounded, shared).items():
        np.testing.assert_allclose(norm, wide.norms(back, shared)[name], rtol=1e-6)
        merged = narrow.merge(name, toy.weights[name].astype(jnp.bfloat16), rounded, shared)
        assert merged.dtype == jnp.bfloat16


def test_columns_beyond_a_rank_do_not_train(toy, method):
    """Invariant 3: zero gradient, and the same bits after training, wherever an index exceeds its layer's rank."""
    cohort = toy.cohort(method=method)
    adapter = toy.trained(cohort)
    gradient = jax.jit(jax.grad(lambda state: jnp.sum(toy.run(cohort, state, toy.x(3)) ** 2)))(adapter)
    start = toy.init(cohort, jax.random.key(0))  # the key that `trained` starts from
    padded = 0
    for name, spec in cohort.specs.items():
        lead = 1 if spec.info.layers else 0
        for leaf, axes in cohort.axes()[name].items():
            beyond = np.zeros(adapter[name][leaf].shape, bool)
            for axis, logical in enumerate(axes):
                if logical == "rank":
                    index = np.arange(spec.rank).reshape([-1 if other == axis else 1 for other in range(len(axes))])
                    beyond |= index >= np.reshape(spec.ranks, [-1] * lead + [1] * (len(axes) - lead))
            padded += beyond.sum()
            assert not np.any(np.asarray(gradient[name][leaf])[beyond])
            np.testing.assert_array_equal(
                np.asarray(adapter[name][leaf])[beyond], np.asarray(start[name][leaf])[beyond]
            )
            if not beyond.all():
                assert np.any(np.asarray(gradient[name][leaf])[~beyond])
    assert padded > 0


def test_mixed_rows_are_each_user_alone(toy, method):
    """Invariants 4 and 5: a batch of users == each alone; slot -1 == the base, bitwise, whoever else is in it."""
    cohort = toy.cohort(method=method)
    shared = toy.shared(cohort)
    users = [toy.trained(cohort, seed) for seed in range(3)]
    slot, x = [2, -1, 0, 0, 1, -1], toy.x(9, batch=6)
    mixed = bind_slots(cohort, _pool(users, cohort), shared, jnp.asarray(slot))
    together = toy.forward(toy.weights, mixed, x)
    base, base_rows = toy.op_by_op(NO_ADAPT, x), toy.op_by_op(mixed, x)
    for row, index in enumerate(slot):
        if index < 0:
            np.testing.assert_array_equal(base_rows[row], base[row])
        else:
            alone = toy.run(cohort, users[index], x[row : row + 1])[0]
            np.testing.assert_allclose(together[row], alone, rtol=1e-5, atol=1e-5)

    broken = [*users[:2], jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), users[2])]
    poisoned = toy.forward(toy.weights, bind_slots(cohort, _pool(broken, cohort), shared, jnp.asarray(slot)), x)
    _equal(poisoned[1:], together[1:])
    assert np.all(np.isnan(poisoned[0]))


def test_mixed_rows_train_each_user_alone(toy, method):
    """Invariant 2 in the indexed layout: a slot's gradient is its own rows', exactly zero for a slot without rows."""
    cohort = toy.cohort(method=method)
    shared, users, x = toy.shared(cohort), [toy.trained(cohort, seed) for seed in range(3)], toy.x(9, batch=3)
    pool, slot = _pool(users, cohort), jnp.asarray([2, -1, 0])
    loss = lambda pool: jnp.sum(toy.forward(toy.weights, bind_slots(cohort, pool, shared, slot), x) ** 2)  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(pool)
    alone = jax.jit(jax.grad(lambda state: jnp.sum(toy.run(cohort, state, x[:1]) ** 2)))(users[2])
    for name, spec in cohort.specs.items():
        take = lambda leaf, index: leaf[:, index] if spec.info.layers else leaf[index]  # noqa: B023, E731
        for leaf, got in gradient[name].items():
            assert not np.any(np.asarray(take(got, 1)))
            np.testing.assert_allclose(take(got, 2), alone[name][leaf], rtol=1e-4, atol=1e-4)


def test_a_population_of_fresh_adapters_is_each_alone(toy, method):
    """Invariant 1, for the start."""
    cohort = toy.cohort(method=method)
    keys = jax.random.split(jax.random.key(3), 4)
    population = jax.jit(jax.vmap(cohort.init))(keys)
    for user in range(4):
        _equal(member(population, user), toy.init(cohort, keys[user]))


def test_vmapped_users_are_each_alone(toy, method):
    """Invariant 1, for output and gradient through the layer scan."""
    cohort = toy.cohort(method=method)
    users = [toy.trained(cohort, seed) for seed in range(3)]
    population = jax.tree.map(lambda *leaves: jnp.stack(leaves), *users)
    x = jnp.stack([toy.x(seed) for seed in range(3)])
    loss = lambda state, x: jnp.mean(toy.run(cohort, state, x) ** 2)  # noqa: E731
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss)))(population, x)
    one = jax.jit(jax.value_and_grad(loss))
    for user, state in enumerate(users):
        value, gradient = one(state, x[user])
        np.testing.assert_allclose(values[user], value, rtol=1e-6)
        _close(member(gradients, user), gradient)


def test_shapes_and_axes_agree(toy, method):
    cohort = toy.cohort(method=method)
    state, shared = toy.init(cohort, jax.random.key(0)), toy.shared(cohort)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(lambda leaf: leaf.shape, cohort.abstract())
    assert cohort.num_params == sum(leaf.size for leaf in jax.tree.leaves(state))
    for tree, axes in ((state, cohort.axes()), (shared, cohort.axes(shared=True))):
        assert {name: set(leaves) for name, leaves in tree.items()} == {name: set(own) for name, own in axes.items()}
        for name, leaves in tree.items():
            info = toy.sites[name]
            sizes = {"layers": info.layers, "rank": cohort.specs[name].rank}
            sizes |= {info.axes[0]: info.d_in, info.axes[1]: info.d_out}
            for leaf, array in leaves.items():
                assert array.shape == tuple(sizes[axis] for axis in axes[name][leaf])


def test_shared_arrays_are_the_same_each_time(toy, method):
    cohort = toy.cohort(method=method)
    _equal(cohort.shared(toy.weights.__getitem__), cohort.shared(toy.weights.__getitem__))


def test_linear_methods_are_linear_in_the_state(toy, method):
    """A row that says `linear` mixes: delta(2 s1 - 3 s2) == 2 delta(s1) - 3 delta(s2); one that does not, does not."""
    cohort = toy.cohort(method=method)
    one, other = toy.trained(cohort, 0), toy.trained(cohort, 1)
    mixed = _dense_deltas(toy, cohort, jax.tree.map(lambda a, b: 2.0 * a - 3.0 * b, one, other))
    apart = [_dense_deltas(toy, cohort, each) for each in (one, other)]
    error = max(float(jnp.max(jnp.abs(mixed[name] - (2.0 * apart[0][name] - 3.0 * apart[1][name])))) for name in mixed)
    assert (error < 1e-5) == METHODS[method].linear


def test_dropout_without_a_key_is_off(toy, method):
    plain, dropping = toy.cohort(method=method), toy.cohort(method=method, dropout=0.5)
    adapter = toy.trained(plain)
    without = toy.run(plain, adapter, toy.x())
    _equal(toy.run(dropping, adapter, toy.x()), without)
    _equal(toy.run(plain, adapter, toy.x(), dropout_key=jax.random.key(0)), without)
    assert np.any(toy.run(dropping, adapter, toy.x(), dropout_key=jax.random.key(0)) != without)


def test_dropout_is_unbiased_and_only_in_the_adapter(toy, method):
    """E[delta(drop(x))] = delta(x) at the head, where nothing non-linear follows; y never loses a feature."""
    cohort = toy.cohort(method=method, dropout=0.3, targets=("lm_head",))
    adapter, x = toy.trained(cohort), toy.x()
    keys = jax.random.split(jax.random.key(0), 4000)
    outs = jax.jit(jax.vmap(lambda key: toy.run(cohort, adapter, x, dropout_key=key)))(keys)
    error = np.abs(jnp.mean(outs, axis=0) - toy.run(cohort, adapter, x))
    assert np.all(error <= 6.0 * np.std(outs, axis=0) / np.sqrt(len(keys)) + 1e-5)
    fresh = toy.init(cohort, jax.random.key(0))
    _equal(toy.run(cohort, fresh, x, dropout_key=keys[0]), toy.base(x))


def test_dropout_differs_by_user_layer_and_site(toy, method):
    """Equal states at every layer and site of one shape: only the masks can differ."""
    info = dataclasses.replace(toy.sites["layers.attn.q_proj"], d_in=12, d_out=12)
    sites = {name: dataclasses.replace(info, name=name) for name in ("layers.attn.q_proj", "layers.attn.k_proj")}
    square = dataclasses.replace(toy, sites=sites)
    cohort = square.cohort(method=method, dropout=0.5, targets=("layers.*",))
    weight = jnp.broadcast_to(toy.weights["lm_head"][:, :12], (3, 12, 12))
    shared = cohort.shared(lambda name: weight)
    keys = iter(jax.random.split(jax.random.key(4), 100))
    one = jax.tree.map(
        lambda leaf: jax.random.normal(next(keys), leaf.shape[1:]), cohort.abstract()["layers.attn.q_proj"]
    )
    adapter = {name: jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (3, *leaf.shape)), one) for name in sites}
    x, y = jnp.ones((4, 12)), jnp.zeros((4, 12))

    def outputs(key):
        layers = bind(cohort, adapter, shared, dropout_key=key).layers
        slices = [jax.tree.map(lambda leaf: leaf[layer], layers) for layer in range(3)]  # noqa: B023
        return [np.asarray(layer(x, {name: y})[name]) for layer in slices for name in sites]

    first, again, other_user = (outputs(jax.random.key(seed)) for seed in (0, 0, 1))
    _equal(first, again)
    everything = [out.tobytes() for out in first + other_user]
    assert len(set(everything)) == len(everything)


def test_dropout_masks_differ_in_a_vmapped_population(toy, method):
    cohort = toy.cohort(method=method, dropout=0.5)
    adapter, x = toy.trained(cohort), toy.x()
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(lambda key: toy.run(cohort, adapter, x, dropout_key=key)))(keys)
    for user in range(3):
        np.testing.assert_allclose(
            together[user], toy.run(cohort, adapter, x, dropout_key=keys[user]), rtol=1e-5, atol=1e-5
        )
    assert np.any(together[0] != together[1])


def test_only_outer_or_only_layered_sites(toy, method):
    """A cohort without layered sites still goes through the layer scan, as does one without outer sites."""
    for targets in (("lm_head",), (r"layers\.0\.attn\.q_proj",)):
        cohort = toy.cohort(method=method, targets=targets)
        adapter, shared = toy.trained(cohort), toy.shared(cohort)
        slots = bind_slots(cohort, _pool([adapter], cohort), shared, jnp.asarray([0, -1, 0, 0]))
        mixed = toy.op_by_op(slots, toy.x())
        own = toy.run(cohort, adapter, toy.x())
        np.testing.assert_allclose(mixed[0], own[0], rtol=1e-5, atol=1e-5)
        _equal(mixed[1], toy.op_by_op(NO_ADAPT, toy.x())[1])
        assert np.any(own != toy.base(toy.x()))
