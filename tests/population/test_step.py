"""One user is the semantics: what the population does to a member is what training that member alone does."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from popax.adapters.apply import bind
from popax.adapters.cohort import Cohort
from popax.adapters.table import METHODS
from popax.objectives.base import mean_of
from popax.objectives.sft import sft
from popax.population.optimizer import adamw, clip_by_global_norm, constant, lion, sgd, warmup_cosine
from popax.population.state import (
    PopulationState,
    empty_population,
    hparams,
    init_member,
    init_population,
    population_shardings,
)
from popax.population.step import member_step, population_step
from popax.sharding import ShardingRules
from popax.trees import member
from tests.population.conftest import EVERY_SITE

OPTIMIZERS = {
    # Where a gradient is rounding alone (softmax cancels a bias of keys, but for its rotation), eps = 1e-8 makes a step
    # of the learning rate of it. Rounding is about 1e-10 there: at a rate of 1e-2, eps = 1e-5 keeps 1e-7 of it.
    "adamw": adamw(weight_decay=0.1, eps=1e-5),
    "sgd": sgd(momentum=0.9),
    "lion": lion(),
    "adafactor": lambda own: optax.adafactor(own.learning_rate, min_dim_size_to_factor=4),
}
USERS = 4


def settings(users=USERS):
    return hparams(learning_rate=1.0, max_steps=100, clip_norm=1.0)._replace(
        learning_rate=jnp.asarray([1e-2, 3e-3, 1e-2, 1e-3][:users], jnp.float32)
    )


def fresh(bench, method, optimizer, users=USERS, **changes):
    cohort = bench.cohort(method, **changes)
    keys = jax.random.split(jax.random.key(1), users)
    state = jax.jit(lambda keys, own: init_population(cohort, optimizer, keys, own))(keys, settings(users))
    return cohort, bench.shared(cohort), state


class Case(NamedTuple):
    """A method with an optimizer, traced and compiled once for all that is asked of its step."""

    cohort: Cohort
    optimizer: Callable
    shared: dict
    state: PopulationState
    step: Callable


def assert_close(left, right, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), left, right)


def assert_same_bytes(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


# Two factors, derived leaves, a core, a tied vector, hidden states, virtual tokens: what a step can see of a method.
OF_EACH_FORM = ("lora", "dora", "lora_xs", "tiny_lora", "reft", "prompt", "delta_mem")
# An optimizer sees leaves, whatever their method: all of them with two methods, and all methods with one of them.
COMBINATIONS = [
    (method, name) for method in METHODS for name in OPTIMIZERS if name == "adamw" or method in ("lora", "svf")
]


by_case = functools.partial(pytest.mark.parametrize, "case", indirect=True, scope="module", ids="-".join)
WITH_ADAMW = [pair for pair in COMBINATIONS if pair[1] == "adamw"]


@pytest.fixture(scope="module")
def case(request, bench) -> Case:
    method, name = request.param
    # Every site once; three stand for all elsewhere.
    changes = {"targets": EVERY_SITE} if request.param == ("lora", "adamw") else {}
    dropout = 0.1 if METHODS[method].drops else 0.0
    cohort, shared, state = fresh(bench, method, OPTIMIZERS[name], dropout=dropout, **changes)
    step = population_step(cohort, sft(bench.model), OPTIMIZERS[name], warmup_cosine(), weight=bench.model.site_weight)
    return Case(cohort, OPTIMIZERS[name], shared, state, jax.jit(step))


@by_case(COMBINATIONS)
def test_invariant_1_member_in_population_equals_member_alone(bench, random_batch, case):
    cohort, shared, state = case.cohort, case.shared, case.state
    alone = jax.jit(
        member_step(cohort, sft(bench.model), case.optimizer, warmup_cosine(), weight=bench.model.site_weight)
    )
    single = [member(state, user) for user in range(USERS)]
    for step in range(3):
        batch = random_batch(USERS, seed=step)
        state, metrics = case.step(bench.params, shared, state, batch)
        for user in range(USERS):
            single[user], own = alone(bench.params, shared, single[user], member(batch, user))
            assert_close(member(metrics, user), own, 1e-5)
    for user in range(USERS):
        assert_close(member(state, user).adapters, single[user].adapters, 1e-6)
        assert int(member(state, user).step) == 3


@by_case(WITH_ADAMW)
def test_invariant_2_no_gradient_from_one_users_tokens_to_anothers_adapter(bench, random_batch, case):
    cohort, shared, state = case.cohort, case.shared, case.state
    objective, batch = mean_of(sft(bench.model)), random_batch(USERS)

    def loss_of_user(adapters, user):
        losses = jax.vmap(lambda one, own: objective(bench.params, bind(cohort, one, shared), own)[0])(adapters, batch)
        return losses[user]

    gradient = jax.jit(jax.grad(loss_of_user))
    for user in range(USERS):
        grads = gradient(state.adapters, user)
        for leaf in jax.tree.leaves(grads):
            others = np.delete(np.asarray(leaf), user, axis=0)
            assert not others.any(), "a gradient crossed from one user to another"
        assert any(np.asarray(leaf[user]).any() for leaf in jax.tree.leaves(grads))


@by_case([pair for pair in COMBINATIONS if pair[1] != "adafactor"])
def test_invariant_3_unused_slots_and_padded_columns_do_not_change(bench, random_batch, case):
    cohort, shared = case.cohort, case.shared
    state = case.state._replace(active=jnp.asarray([True, False, True, True]))
    after = state
    for index in range(3):
        after, metrics = case.step(bench.params, shared, after, random_batch(USERS, seed=index))
    assert_same_bytes(member(after, 1), member(state, 1))
    assert not bool(metrics.ran[1])
    for name, axes in cohort.axes().items():
        spec = cohort.specs.get(name)  # None of what is tied, whose leaves have no rank
        for leaf_name, leaf in after.adapters[name].items():
            for axis, logical in enumerate(axes[leaf_name]):
                if logical != "rank":
                    continue
                for layer, rank in enumerate(spec.ranks):
                    beyond = np.take(np.asarray(leaf[:, layer]), range(rank, spec.rank), axis=axis)
                    assert not beyond.any(), f"{name}.{leaf_name} layer {layer}: columns beyond rank {rank} moved"
    changed = [
        np.asarray(a != b).any() for a, b in zip(jax.tree.leaves(after.adapters), jax.tree.leaves(state.adapters))
    ]
    assert any(changed)


@by_case([("lora", "adamw")])
def test_an_empty_slot_beside_a_user_changes_nothing(bench, random_batch, case):
    cohort, shared, state = case.cohort, case.shared, case.state
    empty = empty_population(cohort, case.optimizer, USERS)
    batch = jax.tree.map(jnp.zeros_like, random_batch(USERS))
    after, metrics = case.step(bench.params, shared, empty, batch)
    assert_same_bytes(after, empty)
    assert np.isfinite(np.asarray(metrics.loss)).all()
    assert jax.tree.structure(empty) == jax.tree.structure(state)


@by_case(WITH_ADAMW)
def test_a_users_nan_leaves_every_other_users_bytes(bench, random_batch, case):
    shared, state, batch = case.shared, case.state, random_batch(USERS)
    poisoned = state._replace(
        adapters=jax.tree.map(lambda leaf: leaf.at[2].set(jnp.nan), state.adapters),
    )
    healthy_after, _ = case.step(bench.params, shared, state, batch)
    after, metrics = case.step(bench.params, shared, poisoned, batch)
    for user in (0, 1, 3):
        assert_same_bytes(member(after, user), member(healthy_after, user))
    assert int(after.skipped[2]) == 1
    assert not bool(metrics.ran[2])
    assert int(after.step[2]) == 1
    assert_same_bytes(member(after.opt_state, 2), member(poisoned.opt_state, 2))


def test_each_user_has_a_learning_rate_a_clip_and_an_end_of_their_own(bench, random_batch):
    cohort, shared, state = fresh(bench, "lora", sgd())
    state = state._replace(
        hparams=state.hparams._replace(
            learning_rate=jnp.asarray([0.0, 1.0, 1.0, 1.0], jnp.float32),
            clip_norm=jnp.asarray([jnp.inf, jnp.inf, 1e-3, jnp.inf], jnp.float32),
            max_steps=jnp.asarray([5, 5, 5, 1], jnp.int32),
        )
    )
    step = jax.jit(population_step(cohort, sft(bench.model), sgd(), constant(), weight=bench.model.site_weight))
    first, metrics = step(bench.params, shared, state, random_batch(USERS))
    assert_same_bytes(member(first.adapters, 0), member(state.adapters, 0))
    moved = jax.tree.map(lambda a, b: a - b, first.adapters, state.adapters)
    norms = [float(optax.tree.norm(member(moved, user))) for user in range(USERS)]
    np.testing.assert_allclose(norms[2], 1e-3, rtol=1e-4)
    np.testing.assert_allclose(norms[1], float(metrics.grad_norm[1]), rtol=1e-4)
    assert first.active.tolist() == [True, True, True, False]
    second, _ = step(bench.params, shared, first, random_batch(USERS, seed=1))
    assert second.step.tolist() == [2, 2, 2, 1]
    assert_same_bytes(member(second, 3), member(first, 3))


def test_clip_is_the_published_formula():
    grads = {"a": jnp.asarray([3.0, 4.0]), "b": jnp.asarray([[12.0]])}
    clipped, norm = clip_by_global_norm(grads, jnp.float32(6.5))
    assert float(norm) == 13.0
    np.testing.assert_allclose(clipped["b"], [[6.0]])
    same, _ = clip_by_global_norm(grads, jnp.float32(jnp.inf))
    assert_same_bytes(same, grads)


def test_schedule_ends_at_the_users_own_last_step():
    factor = warmup_cosine(warmup_fraction=0.1, floor=0.1)
    values = [float(factor(jnp.int32(step), jnp.int32(20))) for step in range(20)]
    assert values[0] == pytest.approx(0.5)
    assert values[1] == pytest.approx(1.0)
    assert 0.1 < values[-1] < 0.11
    assert values[1:] == sorted(values[1:], reverse=True)


@by_case(WITH_ADAMW)
def test_invariants_7_and_9_no_recompilation_and_the_base_keeps_its_bytes(bench, random_batch, case):
    before = jax.tree.map(np.asarray, bench.params)
    state, _ = case.step(bench.params, case.shared, case.state, random_batch(USERS))
    compiled = case.step._cache_size()
    newcomer_of = jax.jit(lambda key, own: init_member(case.cohort, case.optimizer, key, own))
    for index in range(3):
        newcomer = newcomer_of(jax.random.key(100 + index), member(state.hparams, 0))
        state = jax.tree.map(lambda leaf, new, at=index: leaf.at[at].set(new), state, newcomer)
        state, _ = case.step(bench.params, case.shared, state, random_batch(USERS, seed=index))
    assert case.step._cache_size() == compiled
    assert_same_bytes(bench.params, before)


@pytest.mark.parametrize("method", OF_EACH_FORM)
def test_invariant_10_no_collective_crosses_the_population_axis(bench, random_batch, method):
    users = 8
    cohort = bench.cohort(method)
    shared = bench.shared(cohort)
    state = init_population(
        cohort, adamw(), jax.random.split(jax.random.key(1), users), hparams(learning_rate=1e-3, max_steps=9)
    )
    mesh = Mesh(np.array(jax.devices()[:users]), ("population",))
    sharded = jax.device_put(state, population_shardings(cohort, state, mesh, ShardingRules()))
    batch = random_batch(users)
    by_user = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("population")))
    everywhere = NamedSharding(mesh, PartitionSpec())
    base, common = jax.device_put((bench.params, shared), everywhere)
    step = jax.jit(
        population_step(
            cohort, sft(bench.model), adamw(), constant(), weight=bench.model.site_weight, spmd_axis_name="population"
        )
    )
    compiled = step.lower(base, common, sharded, by_user).compile()
    text = compiled.as_text()
    for collective in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"):
        assert collective not in text, f"{collective} in the population step"
    after, _ = compiled(base, common, sharded, by_user)
    assert all(leaf.sharding.spec[0] == "population" for leaf in jax.tree.leaves(after.adapters))
    unsharded, _ = jax.jit(
        population_step(cohort, sft(bench.model), adamw(), constant(), weight=bench.model.site_weight)
    )(bench.params, shared, state, batch)
    # Adam's first step is the gradient's sign where the gradient is not rounding alone.
    assert_close(after.adapters, unsharded.adapters, 2e-6)


@pytest.mark.parametrize("parts", [2, 5])
def test_micro_batches_of_unequal_targets_are_one_batch(bench, random_batch, parts):
    """Ten rows at once, or in so many parts: the same gradient, loss and step, to 1e-6; with adapters of several kinds
    of leaves and each user's own targets."""
    cohort, shared, state = fresh(bench, "dora", OPTIMIZERS["adamw"])
    whole = random_batch(USERS, rows=10, seed=3)
    # Part 0 of user 1 has no target at all; the others have from few to many.
    weights = np.array(whole.weights_BxT)
    for user in range(USERS):
        for row in range(10):
            weights[user, row, : (row + user) % 9] = 0
    weights[1, : 10 // parts] = 0
    whole = whole._replace(weights_BxT=jnp.asarray(weights))
    cut = jax.tree.map(lambda leaf: leaf.reshape(USERS, parts, 10 // parts, *leaf.shape[2:]), whole)
    counts = np.asarray(cut.weights_BxT).sum((2, 3))
    assert len(set(counts[0])) > 1
    arguments = (cohort, sft(bench.model), OPTIMIZERS["adamw"], constant())
    at_once, in_parts = (
        jax.jit(population_step(*arguments, accumulate=accumulate, weight=bench.model.site_weight))
        for accumulate in (1, parts)
    )
    one, other = state, state
    for _ in range(2):
        one, whole_metrics = at_once(bench.params, shared, one, whole)
        other, part_metrics = in_parts(bench.params, shared, other, cut)
        assert_close(whole_metrics, part_metrics, 1e-6)
    assert_close(one.adapters, other.adapters, 1e-6)
    assert_close(one.opt_state, other.opt_state, 1e-6)


def test_each_member_has_their_own_betas_eps_and_decay(bench, random_batch):
    """A population whose members differ in them: each as if the optimizer had been made with theirs."""
    cohort, shared, state = fresh(bench, "lora", adamw())
    own = {"b1": [0.9, 0.5, 0.9, 0.8], "b2": [0.999, 0.9, 0.99, 0.999], "eps": [1e-8, 1e-3, 1e-6, 1e-8]}
    own["weight_decay"] = [0.0, 0.1, 0.0, 0.3]
    arrays = {name: jnp.asarray(values, jnp.float32) for name, values in own.items()}
    state = state._replace(hparams=state.hparams._replace(**arrays))
    together = jax.jit(population_step(cohort, sft(bench.model), adamw(), constant()))
    after = state
    for seed in range(3):
        after, _ = together(bench.params, shared, after, random_batch(USERS, seed=seed))
    for user in range(USERS):
        # optax's own, of numbers and not of arrays.
        made = {name: values[user] for name, values in own.items()}
        alone = lambda hparams, made=made: optax.adamw(hparams.learning_rate, **made)  # noqa: E731
        step, single = jax.jit(member_step(cohort, sft(bench.model), alone, constant())), member(state, user)
        for seed in range(3):
            single, _ = step(bench.params, shared, single, member(random_batch(USERS, seed=seed), user))
        assert_close(member(after, user).adapters, single.adapters, 1e-5)
