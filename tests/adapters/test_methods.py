"""What every row of the table promises, for every start it has; a new row is covered as it is added."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.apply import bind, bind_slots
from popax.adapters.base import ALPHA_RULES
from popax.adapters.cohort import scales
from popax.adapters.table import METHODS, ROWS, method_of
from popax.errors import ConfigError
from popax.trees import member
from popax.types import NO_ADAPT
from tests.adapters.conftest import TOKENS

# milora and olora are pissa's row but for what their users share, which tests/adapters/test_inits.py looks at.
TESTED = [row for row in ROWS if row not in ("lora/milora", "lora/olora")]
every_row = pytest.mark.parametrize("row", TESTED)
# These two share arrays as pissa does: what a batch or a user's gradient is does not depend on which.
IN_A_BATCH = [row for row in TESTED if row not in ("lora/olora_tail", "lora/mica")]
# Two factors, derived leaves, a core, a tied vector, hidden states, virtual tokens, a memory.
OF_EACH_FORM = ("lora", "dora", "lora_xs", "tiny_lora", "reft", "prompt", "delta_mem")


def _equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def _close(one, other):
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6), one, other)


def _pool(adapters, cohort):
    """[L, S, ...] at layered sites, [S, ...] elsewhere."""

    def at_site(name, axis):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=axis), *(each[name] for each in adapters))

    return {name: at_site(name, int(layered)) for name, layered in cohort.layered.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _dense_deltas(toy, cohort, adapter):
    """Each site's change of (W; bias) as a matrix, read off the method's own forward on unit vectors and on zero."""
    shared, dense, seen = toy.shared(cohort), {}, cohort.spread(adapter)
    for name, spec in cohort.specs.items():
        info = spec.info
        width = spec.rank if info.kind == "embedding" else info.d_in
        probes = jnp.concatenate((jnp.eye(width), jnp.zeros((1, width))))

        def one(state, own, scale, w, bias, probes=probes):
            y = probes @ w + bias[None]
            change = cohort.method.delta(state, own, scale, probes, y, lambda x: x) - y
            return jnp.concatenate((change[:-1] - change[-1:], change[-1:]))

        base = {
            "linear": lambda info, name: (toy.weights[name], toy.biases[name]),
            # A hidden site hands on what it is given; the base has nothing in the place of virtual tokens.
            "hidden": lambda info, name: (
                jnp.eye(info.d_in)[None].repeat(info.layers, 0),
                jnp.zeros((info.layers, info.d_out)),
            ),
            "embedding": lambda info, name, width=width: (jnp.zeros((width, info.d_out)), jnp.zeros(info.d_out)),
        }[info.kind](info, name)
        operands = (seen[name], shared.get(name, {}), scales(spec), *base)
        dense[name] = jax.vmap(one)(*operands) if info.layers else one(*operands)
    return dense


@functools.partial(jax.jit, static_argnums=(0, 1))
def _merged(toy, cohort, adapter):
    """Each site's weight and bias with the adapter in them."""
    return {
        name: cohort.merge(name, toy.weights[name], adapter, toy.shared(cohort), toy.biases[name])
        for name in cohort.specs
    }


@pytest.mark.parametrize(
    ("row", "dtype"), [*((row, "float32") for row in TESTED), *((row, "bfloat16") for row in OF_EACH_FORM)]
)
def test_a_fresh_adapter_is_the_base(toy, row, dtype):
    """Invariant 4, bitwise, for the starts that claim it; the others do differ."""
    own = method_of(ROWS[row])
    for init, identity in own.inits.items():
        if method_of(dataclasses.replace(ROWS[row], init=init)) is not own:
            continue  # a start with a row of its own
        cohort = toy.cohort(row=row, init=init, dtype=dtype)
        assert cohort.starts_at_base == identity
        out = toy.op_by_op(bind(cohort, toy.init(cohort, jax.random.key(1)), toy.shared(cohort)), toy.x())
        assert bool(jnp.all(out == toy.op_by_op(NO_ADAPT, toy.x()))) == identity


# A rule gives a number to whichever method: two of them stand for all.
RULES = [(row, rule) for row in TESTED for rule in ALPHA_RULES if rule == "rank" or row in ("lora", "lora_xs")]


@pytest.mark.parametrize(("row", "rule"), RULES)
def test_output_is_the_merged_weights_output(toy, row, rule):
    """Invariant 4: y + delta(x) == x W', with mixed ranks and every alpha rule that the method knows."""
    cohort, trained = toy.cohort(row=row, alpha_rule=rule, alpha=1.5), toy.cohort(row=row)
    adapter, shared = toy.trained(trained), toy.shared(cohort)
    if cohort.method.kind != "linear":
        with pytest.raises(ConfigError, match="changes no weight"):
            cohort.merge(cohort.sites[0].info.name, toy.weights["lm_head"], adapter, shared)
        return
    changed = _merged(toy, cohort, adapter)
    merged = toy.weights | {name: weight for name, (weight, _) in changed.items()}
    biases = toy.biases | {name: bias for name, (_, bias) in changed.items()}
    own = toy.run(cohort, adapter, toy.x())
    np.testing.assert_allclose(own, toy.forward(merged, NO_ADAPT, toy.x(), biases), rtol=1e-5, atol=1e-5)
    assert float(jnp.max(jnp.abs(own - toy.base(toy.x())))) > 1e-3


@every_row
def test_merge_and_norms_are_the_dense_deltas(toy, row):
    cohort = toy.cohort(row=row)
    adapter, shared = toy.trained(cohort), toy.shared(cohort)
    norms = cohort.norms(adapter, shared)
    assert set(norms) == set(cohort.specs)
    all_merged = _merged(toy, cohort, adapter) if cohort.method.kind == "linear" else {}
    for name, dense in _dense_deltas(toy, cohort, adapter).items():
        if cohort.method.memory is not None:  # no change of weights: what any token's correction is at most
            assert np.all(np.linalg.norm(dense[..., -1:, :] + dense, axis=-1) <= np.asarray(norms[name])[:, None])
            continue
        np.testing.assert_allclose(norms[name], np.linalg.norm(dense, axis=(-2, -1)), rtol=1e-4, atol=1e-6)
        if cohort.method.kind != "linear":
            continue
        merged, bias = all_merged[name]
        np.testing.assert_allclose(merged - toy.weights[name], dense[..., :-1, :], rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(bias - toy.biases[name], dense[..., -1, :], rtol=1e-5, atol=2e-6)
    exceptions = {"linear": ["layers.mlp.up_proj"], "hidden": ["layers.out"], "embedding": []}[cohort.method.kind]
    assert [float(norms[name][2]) for name in exceptions] == [0.0] * len(exceptions)
    if not cohort.adds:
        with pytest.raises(ConfigError, match=cohort.config.method):
            cohort.factors(cohort.sites[-1].info.name, adapter, shared)
        return
    a, b = cohort.factors("lm_head", adapter, shared)
    np.testing.assert_allclose(a.T @ b * scales(cohort.specs["lm_head"]), dense[:-1], rtol=1e-5, atol=2e-6)


@every_row
def test_bfloat16_adapters_apply_merge_and_measure(toy, row):
    wide, narrow = toy.cohort(row=row), toy.cohort(row=row, dtype="bfloat16")
    adapter, shared = toy.trained(wide), toy.shared(wide)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), adapter)
    back = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded)
    np.testing.assert_allclose(toy.run(narrow, rounded, toy.x()), toy.run(wide, back, toy.x()), rtol=1e-5, atol=1e-5)
    for name, norm in narrow.norms(rounded, shared).items():
        np.testing.assert_allclose(norm, wide.norms(back, shared)[name], rtol=1e-6)
        if narrow.method.kind != "linear":
            continue
        merged, bias = narrow.merge(name, toy.weights[name].astype(jnp.bfloat16), rounded, shared)
        assert merged.dtype == jnp.bfloat16
        assert (bias is not None) == narrow.method.makes_bias


@every_row
def test_columns_beyond_a_rank_do_not_train(toy, row):
    """Invariant 3: zero gradient, and the same bits after training, wherever an index exceeds its layer's rank."""
    cohort = toy.cohort(row=row)
    adapter = toy.trained(cohort)
    gradient = jax.jit(jax.grad(lambda state: jnp.sum(toy.run(cohort, state, toy.x(3)) ** 2)))(adapter)
    start = toy.init(cohort, jax.random.key(0))  # the key that `trained` starts from
    padded = 0
    for name, layered in cohort.layered.items():
        lead = int(layered)
        for leaf, axes in cohort.axes()[name].items():
            spec = cohort.specs.get(name)  # None of what is tied, whose leaves have no rank
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
            if not beyond.all() and leaf not in cohort.method.derived:
                assert np.any(np.asarray(gradient[name][leaf])[~beyond])
    assert padded > 0 or not any("rank" in axes for axes in cohort.method.state_axes.values())


@pytest.mark.parametrize("row", IN_A_BATCH)
def test_mixed_rows_are_each_user_alone(toy, row):
    """Invariants 4 and 5: a batch of users == each alone; slot -1 == the base, bitwise, whoever else is in it."""
    cohort = toy.cohort(row=row)
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
    touched = TOKENS.index(0) if cohort.method.kind == "embedding" else len(TOKENS)  # the toy's tokens do not meet
    assert np.all(np.isnan(poisoned[0, :touched]))


@pytest.mark.parametrize("row", IN_A_BATCH)
def test_mixed_rows_train_each_user_alone(toy, row):
    """Invariant 2 in the indexed layout: a slot's gradient is its own rows', exactly zero for a slot without rows."""
    cohort = toy.cohort(row=row)
    shared, users, x = toy.shared(cohort), [toy.trained(cohort, seed) for seed in range(3)], toy.x(9, batch=3)
    pool, slot = _pool(users, cohort), jnp.asarray([2, -1, 0])
    loss = lambda pool: jnp.sum(toy.forward(toy.weights, bind_slots(cohort, pool, shared, slot), x) ** 2)  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(pool)
    alone = jax.jit(jax.grad(lambda state: jnp.sum(toy.run(cohort, state, x[:1]) ** 2)))(users[2])
    for name, layered in cohort.layered.items():
        take = lambda leaf, index: leaf[:, index] if layered else leaf[index]  # noqa: B023, E731
        for leaf, got in gradient[name].items():
            assert not np.any(np.asarray(take(got, 1)))
            np.testing.assert_allclose(take(got, 2), alone[name][leaf], rtol=1e-4, atol=1e-4)


@every_row
def test_a_population_of_fresh_adapters_is_each_alone(toy, row):
    """Invariant 1, for the start."""
    cohort = toy.cohort(row=row)
    keys = jax.random.split(jax.random.key(3), 4)
    population = jax.jit(jax.vmap(cohort.init))(keys)
    for user in range(4):
        _equal(member(population, user), toy.init(cohort, keys[user]))


# tests/population/test_step.py trains the others.
@pytest.mark.parametrize("row", ["lora", *(row for row in TESTED if row not in METHODS)])
def test_vmapped_users_are_each_alone(toy, row):
    """Invariant 1, for output and gradient through the layer scan."""
    cohort = toy.cohort(row=row)
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


@every_row
def test_shapes_and_axes_agree(toy, row):
    cohort = toy.cohort(row=row)
    state, shared = toy.init(cohort, jax.random.key(0)), toy.shared(cohort)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(lambda leaf: leaf.shape, cohort.abstract())
    assert cohort.num_params == sum(leaf.size for leaf in jax.tree.leaves(state))
    for tree, axes in ((state, cohort.axes()), (shared, cohort.axes(shared=True))):
        assert {name: set(leaves) for name, leaves in tree.items()} == {name: set(own) for name, own in axes.items()}
        for name, leaves in tree.items():
            sizes = {"groups": 1}
            vectors = {"v": (13,), "p": (13,), "traits": (16,), "w1": (64, 16), "w2": (64,)}  # of no site's own size
            vectors |= {"prompt": (4,), "rows": (4,)}
            if (form := cohort.method.memory) is not None:
                states = state[name]["gain"].shape[1]
                vectors |= dict.fromkeys(("start", "gain", "gate", *"qkvwp"), (states,))
                assert form.width(4) == cohort.memory
            if name in toy.sites:
                info = toy.sites[name]
                sizes |= {"layers": info.layers, "rank": cohort.specs[name].rank}
                sizes |= {info.axes[0]: info.d_in, info.axes[1]: info.d_out}
            for leaf, array in leaves.items():
                free = iter(vectors.get(leaf, ()))
                wanted = tuple(next(free) if axis == "vector" else sizes[axis] for axis in axes[name][leaf])
                assert array.shape == wanted


@every_row
def test_shared_arrays_are_the_same_each_time(toy, row):
    cohort = toy.cohort(row=row)
    made = [cohort.shared(toy.weights.__getitem__, toy.biases.__getitem__) for _ in range(2)]
    _equal(*made)


@every_row
def test_linear_methods_are_linear_in_the_state(toy, row):
    """A row that says `linear` mixes: delta(2 s1 - 3 s2) == 2 delta(s1) - 3 delta(s2); one that does not, does not."""
    cohort = toy.cohort(row=row)
    one, other = toy.trained(cohort, 0), toy.trained(cohort, 1)
    mixed = _dense_deltas(toy, cohort, jax.tree.map(lambda a, b: 2.0 * a - 3.0 * b, one, other))
    apart = [_dense_deltas(toy, cohort, each) for each in (one, other)]
    error = max(float(jnp.max(jnp.abs(mixed[name] - (2.0 * apart[0][name] - 3.0 * apart[1][name])))) for name in mixed)
    assert (error < 1e-5) == method_of(ROWS[row]).linear


@pytest.mark.parametrize("row", [name for name, method in METHODS.items() if not method.drops])
def test_a_method_without_dropout_says_so(toy, row):
    with pytest.raises(ConfigError, match=r"dropout=0\.5"):
        toy.cohort(row=row, dropout=0.5)


@pytest.mark.parametrize("row", ["lora", "dora", "tiny_lora", "reft"])  # one of each form of a state
def test_only_outer_or_only_layered_sites(toy, row):
    """A cohort without layered sites still goes through the layer scan, as does one without outer sites."""
    kinds = {"linear": (("lm_head",), (r"layers\.0\.attn\.q_proj",)), "hidden": ((r"layers\.0\.out",),)}
    for targets in kinds[method_of(ROWS[row]).kind]:
        cohort = toy.cohort(row=row, targets=targets)
        adapter, shared = toy.trained(cohort), toy.shared(cohort)
        x = toy.x(batch=6)  # six rows of three users: the shapes of the other test of mixed rows
        slots = bind_slots(cohort, _pool([adapter] * 3, cohort), shared, jnp.asarray([0, -1, 0, 0, 1, 2]))
        mixed = toy.op_by_op(slots, x)
        own = toy.run(cohort, adapter, x)
        np.testing.assert_allclose(mixed[0], own[0], rtol=1e-5, atol=1e-5)
        _equal(mixed[1], toy.op_by_op(NO_ADAPT, x)[1])
        assert np.any(own != toy.base(x))
