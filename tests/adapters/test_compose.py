"""Compositions against what they stand for: dense sums, other people's merging code, and what a user may not ask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters import merging
from popax.adapters.changes import Factored, layers_of, total, truncated
from popax.adapters.cohort import Cohort
from popax.adapters.compose import Part, compose
from popax.adapters.core_space import back, core_space
from popax.adapters.table import METHODS
from popax.errors import ComposeError

ADDING = [name for name, method in METHODS.items() if method.factors is not None]


def part(toy, row, seed=0, weight=1.0, **settings):
    cohort = toy.cohort(row=row, **settings)
    return Part(cohort, toy.trained(cohort, seed), toy.shared(cohort), weight)


def dense(change):
    return jnp.einsum("...rd,...rf->...df", *change, precision="highest")


def weights_of(each: Part):
    changes = layers_of(each.cohort, each.adapter, each.shared)
    return {name: each.weight * dense(change) for name, change in changes.items()}


def random_change(seed, rank, d_in=12, d_out=9):
    a, b = jax.random.split(jax.random.key(seed))
    return Factored(jax.random.normal(a, (rank, d_in)), jax.random.normal(b, (rank, d_out)))


@pytest.mark.slow
def test_cat_is_the_true_sum_over_methods_and_ranks(toy):
    """Two ranks of lora and every other method that adds, at other sites each: what they do to x adds, within 1e-6."""
    parts = [part(toy, "lora", 0, 0.7), part(toy, "lora", 1, -0.4, rank=2, targets=("layers.attn.*",))]
    parts += [part(toy, name, seed, 0.3) for seed, name in enumerate(ADDING) if name != "lora"]
    made = compose(parts)
    summed = functools.reduce(
        lambda left, right: {name: left.get(name, 0.0) + right.get(name, 0.0) for name in {*left, *right}},
        map(weights_of, parts),
    )
    got = weights_of(Part(made.cohort, made.adapter, {}))
    assert set(got) == set(summed)
    for name, want in summed.items():
        np.testing.assert_allclose(got[name], want, atol=1e-5 * float(jnp.max(jnp.abs(want))))
        assert made.error[name] < 1e-6  # beyond what a matrix has there is nothing


def test_cat_of_two_is_exact_where_averaging_factors_is_not(toy):
    one, two = part(toy, "lora", 0, 0.5), part(toy, "lora", 1, 0.5)
    made = compose([one, two])
    got, want = weights_of(Part(made.cohort, made.adapter, {})), [weights_of(one), weights_of(two)]
    averaged = jax.tree.map(lambda left, right: (left + right) / 2, one.adapter, two.adapter)
    linear = weights_of(one._replace(adapter=averaged, weight=1.0))
    for name in got:
        true = want[0][name] + want[1][name]
        np.testing.assert_allclose(got[name], true, rtol=1e-6, atol=1e-6)
    wrong = float(jnp.linalg.norm(linear["lm_head"] - want[0]["lm_head"] - want[1]["lm_head"]))
    assert wrong > 0.1 * float(jnp.linalg.norm(want[0]["lm_head"] + want[1]["lm_head"]))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_truncation_is_the_best_of_its_rank_and_says_its_error(rank):
    change = random_change(0, 6)
    got, error = truncated(change, rank)
    w = np.asarray(dense(change), np.float64)
    u, s, vt = np.linalg.svd(w)
    np.testing.assert_allclose(dense(got), (u[:, :rank] * s[:rank]) @ vt[:rank], atol=2e-5)
    np.testing.assert_allclose(error, np.sqrt(np.sum(s[rank:6] ** 2) / np.sum(s**2)), atol=1e-6)


def test_truncation_reports_the_worst_layer_of_a_site(toy):
    parts = [part(toy, "lora", seed) for seed in range(3)]
    made = compose(parts, rank=2)
    assert made.cohort.config.rank == 2
    for name, want in weights_of(Part(*compose(parts)[:2], {})).items():
        got = weights_of(Part(made.cohort, made.adapter, {}))[name]
        left = np.linalg.norm(got - want, axis=(1, 2)) / np.maximum(np.linalg.norm(want, axis=(1, 2)), 1e-30)
        np.testing.assert_allclose(made.error[name], np.max(left), atol=1e-4)


def test_core_space_loses_nothing_at_mixed_ranks():
    changes = [random_change(seed, rank) for seed, rank in enumerate((2, 5, 4))]
    space, cores = core_space(changes)
    assert cores.shape == (3, 11, 9)
    for change, core in zip(changes, cores, strict=True):
        want = np.asarray(dense(change))
        np.testing.assert_allclose(dense(back(space, core)), want, atol=1e-6 * np.max(np.abs(want)))
        np.testing.assert_allclose(np.linalg.norm(core), np.linalg.norm(want), rtol=1e-6)


def test_core_space_bears_factors_that_are_zero():
    changes = [random_change(0, 3), Factored(jnp.zeros((2, 12)), jnp.zeros((2, 9)))]
    space, cores = core_space(changes)
    np.testing.assert_allclose(dense(back(space, cores[0])), dense(changes[0]), atol=1e-5)
    assert not np.any(np.asarray(cores[1]))


def test_ties_is_the_papers_on_a_page():
    x = jnp.asarray([[3.0, -2.0, 0.5, 1.0], [1.0, 4.0, -0.2, -3.0]])
    # Of two entries each stay: [3, -2, 0, 0] and [0, 4, 0, -3]; signs + + + -; who agrees: 3; 4; nobody; -3.
    np.testing.assert_array_equal(merging.ties(x, jnp.ones(2), 0.5), [3.0, 4.0, 0.0, -3.0])


def test_dare_is_unbiased():
    x, weight = jnp.asarray([[1.0, -2.0], [3.0, 0.5]]), jnp.asarray([0.5, 2.0])
    keys = jax.random.split(jax.random.key(0), 20_000)
    mean = jnp.mean(jax.vmap(lambda key: merging.dare(key, x, weight, 0.3))(keys), axis=0)
    np.testing.assert_allclose(mean, weight @ x, rtol=0.02, atol=0.05)
    np.testing.assert_allclose(merging.dare(keys[0], x, weight, 1.0), weight @ x, rtol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_ties_in_core_space_is_pefts_on_the_same_cores(density):
    """A merge of changes is PEFT's own merge of the dense cores, brought back: nothing else happens on the way."""
    torch, merge_utils = pytest.importorskip("torch"), pytest.importorskip("peft.utils.merge_utils")
    changes, weights = [random_change(seed, 3) for seed in range(4)], [0.5, 1.0, -0.3, 0.8]
    space, cores = core_space(changes)
    theirs = merge_utils.ties([torch.tensor(np.asarray(core)) for core in cores], torch.tensor(weights), density)
    merged = merging.ties(cores.reshape(4, -1), jnp.asarray(weights), density).reshape(cores.shape[1:])
    np.testing.assert_allclose(merged, theirs.numpy(), atol=1e-6)
    want = np.asarray(space.p_JxD).T @ theirs.numpy() @ np.asarray(space.q_KxF)
    np.testing.assert_allclose(dense(back(space, merged)), want, atol=1e-5)


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_knots_is_the_dense_decomposition(density):
    """numpy's SVD of [W_1 W_2 W_3] side by side, its right vectors merged entry by entry."""
    changes, weights = [random_change(seed, rank, 12, 7) for seed, rank in enumerate((2, 3, 3))], [1.0, 0.5, 0.8]
    dense_all = np.concatenate([np.asarray(dense(change), np.float64) for change in changes], axis=1)
    u, s, vt = np.linalg.svd(dense_all, full_matrices=False)
    v = np.stack(np.split(vt[:8], 3, axis=1)).reshape(3, -1)
    merged = np.asarray(merging.ties(jnp.asarray(v, jnp.float32), jnp.asarray(weights), density)).reshape(8, 7)
    got = merging.knots(changes, jnp.asarray(weights), density)
    np.testing.assert_allclose(dense(got), (u[:, :8] * s[:8]) @ merged, atol=2e-4)


@pytest.mark.parametrize("how", ["ties", "dare", "knots"])
def test_a_merge_is_an_adapter_of_the_model(toy, how):
    """Merged changes of mixed ranks go back into the model, at every layer and site, and one alone is itself."""
    parts = [part(toy, "lora", 0), part(toy, "lora_xs", 1)]
    made = compose(parts, how, density=0.5)
    assert set(made.adapter) == set(parts[0].cohort.specs)
    assert np.any(toy.run(made.cohort, made.adapter, toy.x()) != toy.base(toy.x()))
    alone = compose(parts[:1], how, density=1.0)
    own = toy.run(parts[0].cohort, parts[0].adapter, toy.x())
    np.testing.assert_allclose(toy.run(alone.cohort, alone.adapter, toy.x()), own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("row", [name for name, method in METHODS.items() if method.linear])
def test_linear_mixing_stays_in_the_cohort(toy, row):
    one, two = part(toy, row, 0, 0.25), part(toy, row, 1, 0.75)
    made = compose([one, two], "linear")
    assert made.cohort == one.cohort
    want = jax.tree.map(lambda left, right: 0.25 * left + 0.75 * right, one.adapter, two.adapter)
    jax.tree.map(np.testing.assert_array_equal, made.adapter, want)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda toy: compose([]), "no adapter"),
        (lambda toy: compose([part(toy, "ia3"), part(toy, "lora")]), "ia3"),
        (lambda toy: compose([part(toy, "dora")]), "dora"),
        (lambda toy: compose([part(toy, "lora"), part(toy, "lora", 1)], "linear"), "not linear"),
        (lambda toy: compose([part(toy, "svf", options={"renormalise": True})], "linear"), "svf"),
        (lambda toy: compose([part(toy, "lora_xs"), part(toy, "lora_xs", rank=2)], "linear"), "different configs"),
        (lambda toy: compose([part(toy, "lora")], rank=9), "rank=9"),
        (lambda toy: compose([part(toy, "lora")], rank=0), "rank=0"),
        (lambda toy: compose([part(toy, "lora")], "ties", density=0.0), "density"),
        (lambda toy: compose([part(toy, "lora", weight=float("nan"))]), "weight"),
        (lambda toy: compose([part(toy, "lora")], "slerp"), "slerp"),
    ],
)
def test_what_cannot_be_composed_says_why(toy, ask, words):
    with pytest.raises(ComposeError, match=words):
        ask(toy)


def test_sites_of_other_shapes_are_another_base(toy):
    import dataclasses

    other = {name: dataclasses.replace(info, d_in=info.d_in + 1) for name, info in toy.sites.items()}
    own = part(toy, "lora")
    foreign = Cohort.of(own.cohort.config, other)
    with pytest.raises(ComposeError, match="d_in=13"):
        compose([own, own._replace(cohort=foreign, adapter=foreign.init(jax.random.key(0)))])


def test_a_sum_of_factors_has_all_their_ranks():
    change = total([random_change(0, 2), random_change(1, 3)], [2.0, -1.0])
    assert change.a_RxD.shape == (5, 12)
    want = 2.0 * dense(random_change(0, 2)) - dense(random_change(1, 3))
    np.testing.assert_allclose(dense(change), want, atol=1e-5)
