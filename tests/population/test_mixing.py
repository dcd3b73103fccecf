"""Mixes are sums; searches find a planted one; each generation is one program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from popax.adapters.apply import bind
from popax.adapters.compose import Part, compose
from popax.errors import ComposeError
from popax.objectives.base import mean_of
from popax.objectives.entropy import entropy
from popax.objectives.sft import sft
from popax.population.mixing import AdapterBasis, CEMConfig, generation, gradient_step, mixed, side_by_side, start
from popax.trees import member
from tests.population.conftest import EVERY_SITE


@pytest.fixture(scope="module")
def parts(bench):
    """Three loud adapters: two of lora, of other ranks, and one of lora_xs."""

    def loud(method, seed, **changes):
        cohort = bench.cohort(method, **changes)
        keys = iter(jax.random.split(jax.random.key(seed), 100))
        shapes = jax.tree.leaves(cohort.abstract())
        leaves = [0.5 * jax.random.normal(next(keys), leaf.shape) for leaf in shapes]
        adapter = jax.tree.unflatten(jax.tree.structure(cohort.abstract()), leaves)
        # Columns beyond a layer's rank stay as they begin.
        fresh = cohort.init(jax.random.key(0))
        for spec in cohort.sites:
            live = np.arange(spec.rank)[None] < np.reshape(spec.ranks, (-1, 1))
            for name, leaf in adapter[spec.info.name].items():
                mask = live[:, :, None] if method == "lora" else live[:, :, None] & live[:, None]
                adapter[spec.info.name][name] = jnp.where(mask, leaf, fresh[spec.info.name][name])
        return Part(cohort, adapter, bench.shared(cohort))

    own = (r"layers\..*q_proj", "lm_head")
    everywhere = {"targets": EVERY_SITE}
    return [loud("lora", 1, **everywhere), loud("lora", 2, rank=1, targets=own), loud("lora_xs", 3, **everywhere)]


def outputs(bench, cohort, adapter, shared, batch):
    def run(adapter, shared, batch):
        adapt = bind(cohort, adapter, shared)
        return bench.model.logits(bench.params, bench.model.batch_hidden(bench.params, batch, adapt=adapt), adapt)

    return jax.jit(run)(adapter, shared, batch)


def test_equal_coefficients_at_all_layers_are_the_sum(bench, random_batch, parts):
    experts, batch = side_by_side(parts), member(random_batch(1), 0)
    mix = jnp.broadcast_to(jnp.asarray([0.5, 1.0, 0.25]), (experts.depth, 3))
    weighted = [part._replace(weight=weight) for part, weight in zip(parts, (0.5, 1.0, 0.25), strict=True)]
    whole = compose(weighted)
    want = outputs(bench, whole.cohort, whole.adapter, {}, batch)
    np.testing.assert_allclose(outputs(bench, experts.cohort, mixed(experts, mix), {}, batch), want, atol=2e-4)


def test_a_layers_coefficients_act_on_that_layer_and_expert_alone(parts):
    experts = side_by_side(parts)
    assert experts.depth == 3  # two layers, and the head
    only = mixed(experts, jnp.zeros((3, 3)).at[1, 0].set(1.0))
    for name, leaves in only.items():
        for index, row in enumerate(experts.rows[name]):
            b = np.asarray(leaves["b"][index] if leaves["b"].ndim == 3 else leaves["b"])
            own = experts.expert_R[name] == 0
            assert not b[~own].any()
            assert b[own].any() == (row == 1)


def planted(bench, random_batch, experts: AdapterBasis, mix):
    """Text whose targets are what the mix would say: its own predictions are best there."""
    batch = member(random_batch(1, rows=8), 0)
    logits = outputs(bench, experts.cohort, mixed(experts, mix), {}, batch)
    return batch._replace(targets_BxT=jnp.argmax(logits, axis=-1).astype(jnp.int32))


def test_the_search_beats_every_single_expert_in_one_program(bench, random_batch, parts):
    experts, objective = side_by_side(parts), sft(bench.model)
    truth = jnp.asarray([[1.0, 0.0, 0.8], [0.0, 0.0, 1.0], [0.0, 0.9, 0.0]])
    batch, config = planted(bench, random_batch, experts, truth), CEMConfig(generations=25)
    step = jax.jit(generation(experts, objective, config))
    search, best = start(experts, config, jax.random.key(0)), []
    for _ in range(config.generations):
        search, loss_N = step(bench.params, search, batch)
        assert loss_N.shape == (32,)
        best.append(float(search.best_loss))
    assert step._cache_size() == 1
    assert best == sorted(best, reverse=True)

    def loss(mix):
        return float(mean_of(objective)(bench.params, bind(experts.cohort, mixed(experts, mix), {}), batch)[0])

    singles = [loss(jnp.zeros((3, 3)).at[:, expert].set(1.0)) for expert in range(3)]
    np.testing.assert_allclose(loss(search.best_MxK), search.best_loss, rtol=1e-4)
    assert float(search.best_loss) < min(singles)
    assert np.all((np.asarray(search.best_MxK) >= 0) & (np.asarray(search.best_MxK) <= 1))


def test_a_candidate_that_is_not_finite_is_never_elite(bench, random_batch, parts):
    """Half of the space overflows: the next mean is of those who did not."""
    experts = side_by_side(parts)
    huge = {name: dict(leaves, b=leaves["b"] * 1e30) for name, leaves in experts.adapter.items()}
    broken = experts._replace(adapter=huge)
    config = CEMConfig(mean=0.0, std=1.0)
    step = jax.jit(generation(broken, sft(bench.model), config))
    search, loss_N = step(bench.params, start(broken, config, jax.random.key(0)), member(random_batch(1), 0))
    assert not np.all(np.isfinite(loss_N))
    assert np.isfinite(float(search.best_loss))


def test_descent_lowers_the_loss_and_so_does_entropy(bench, random_batch, parts):
    experts = side_by_side(parts)
    batch = planted(bench, random_batch, experts, jnp.full((3, 3), 0.9))
    optimizer = optax.adam(0.05)
    for objective in (sft(bench.model), entropy(bench.model, chunk=5)):
        step = jax.jit(gradient_step(experts, objective, optimizer))
        mix = jnp.full((3, 3), 0.2)
        state, losses = optimizer.init(mix), []
        for _ in range(15):
            mix, state, loss = step(bench.params, mix, state, batch)
            losses.append(float(loss))
        assert losses[-1] < losses[0]


def test_entropy_is_that_of_the_whole_distribution_and_reads_no_target(bench, random_batch, parts):
    batch = member(random_batch(1), 0)
    part = parts[0]
    logp = np.asarray(jax.nn.log_softmax(outputs(bench, *part[:3], batch)), np.float64)
    weights = np.asarray(batch.weights_BxT)
    want = (-(np.exp(logp) * logp).sum(-1) * weights).sum() / weights.sum()
    adapt = bind(*part[:3])
    got = mean_of(entropy(bench.model, chunk=5))(bench.params, adapt, batch)[0]
    np.testing.assert_allclose(got, want, rtol=1e-4)
    other = batch._replace(targets_BxT=(batch.targets_BxT + 1) % 32)
    np.testing.assert_array_equal(mean_of(entropy(bench.model, chunk=5))(bench.params, adapt, other)[0], got)


def test_what_cannot_be_mixed_says_why(bench, parts):
    with pytest.raises(ComposeError, match="no expert"):
        side_by_side([])
    with pytest.raises(ComposeError, match="elite"):
        CEMConfig(elite=0.0)
    with pytest.raises(ComposeError, match="population=1"):
        dataclasses.replace(CEMConfig(), population=1)
