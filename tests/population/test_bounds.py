"""Bounded state: no step leaves a user outside of their own budget, and divergence from the base has a price."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.apply import bind
from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.adapters.table import METHODS
from popax.errors import ConfigError
from popax.objectives.base import mean_of
from popax.objectives.kl import sft_with_kl
from popax.objectives.sft import sft
from popax.population.bounds import total_norm, within_budget
from popax.population.optimizer import adamw, constant
from popax.population.state import hparams, init_population
from popax.population.step import member_step, population_step
from popax.trees import member

USERS = 3
SHRINKING = [name for name, method in METHODS.items() if method.shrink is not None]


def _population(bench, method, **settings):
    cohort = bench.cohort(method)
    own = hparams(learning_rate=3e-2, max_steps=50)._replace(**{k: jnp.asarray(v) for k, v in settings.items()})
    keys = jax.random.split(jax.random.key(1), USERS)
    state = jax.jit(lambda keys, own: init_population(cohort, adamw(), keys, own))(keys, own)
    return cohort, bench.shared(cohort), state


@pytest.mark.parametrize("method", SHRINKING)
def test_no_step_leaves_a_user_outside_of_their_budget(bench, random_batch, method):
    """Each user has a budget of their own; one without a bound trains as if nobody had one, to the bit."""
    budgets = [0.02, 0.1, np.inf]
    cohort, shared, state = _population(bench, method, norm_budget=np.float32(budgets))
    norms = jax.jit(jax.vmap(lambda adapter: total_norm(cohort, adapter, shared, "frobenius")))
    bounded = jax.jit(
        population_step(
            cohort, sft(bench.model), adamw(), constant(), weight=bench.model.site_weight, budget="frobenius"
        )
    )
    reached = np.zeros(USERS)
    for index in range(4):
        batch = random_batch(USERS, seed=index)
        state, _ = bounded(bench.params, shared, state, batch)
        reached = np.asarray(norms(state.adapters))
        assert np.all(reached <= np.float32(budgets) * (1 + 1e-5))
    np.testing.assert_allclose(reached[0], budgets[0], rtol=1e-4)  # the small one was felt
    assert reached[2] > reached[1]


def test_a_user_without_a_bound_has_the_bytes_of_one_alone(bench, random_batch):
    cohort, shared, state = _population(bench, "lora", norm_budget=np.float32([0.02, np.inf, np.inf]))
    free = state._replace(hparams=state.hparams._replace(norm_budget=jnp.full(USERS, jnp.inf)))
    step = jax.jit(
        population_step(
            cohort, sft(bench.model), adamw(), constant(), weight=bench.model.site_weight, budget="frobenius"
        )
    )
    one, other = (step(bench.params, shared, each, random_batch(USERS))[0] for each in (state, free))
    for user in (1, 2):
        jax.tree.map(np.testing.assert_array_equal, member(one, user).adapters, member(other, user).adapters)


@pytest.mark.parametrize("method", ["lora", "lora_xs", "svf"])
def test_the_spectral_budget_bounds_every_sites_singular_values(bench, random_batch, method):
    cohort, shared, state = _population(bench, method)
    step = jax.jit(population_step(cohort, sft(bench.model), adamw(), constant()))
    state, _ = step(bench.params, shared, state, random_batch(USERS))
    adapter = member(state, 0).adapters
    whole = float(total_norm(cohort, adapter, shared, "spectral"))
    assert whole > 0
    shrunk = within_budget(cohort, adapter, shared, jnp.float32(whole / 3), "spectral")
    np.testing.assert_allclose(total_norm(cohort, shrunk, shared, "spectral"), whole / 3, rtol=1e-4)
    kept = within_budget(cohort, adapter, shared, jnp.float32(whole * 3), "spectral")
    jax.tree.map(np.testing.assert_array_equal, kept, adapter)


def test_kl_is_that_of_the_whole_distributions(bench, random_batch):
    """Against log-softmaxes of all logits at once, and zero for a fresh adapter."""
    cohort, shared, state = _population(bench, "lora")
    step = jax.jit(population_step(cohort, sft(bench.model), adamw(), constant()))
    trained, _ = step(bench.params, shared, state, random_batch(USERS))
    trained, _ = step(bench.params, shared, trained, random_batch(USERS, seed=1))
    batch, objective = member(random_batch(USERS, seed=2), 0), sft_with_kl(bench.model, chunk=3)
    adapt = bind(cohort, member(trained, 0).adapters, shared)
    loss, sums = mean_of(objective)(bench.params, adapt, batch, hparams(learning_rate=1.0, max_steps=1, kl_weight=0.5))

    @jax.jit
    def logps(adapt):
        x = (
            bench.model.batch_hidden(bench.params, batch, adapt=adapt)
            if adapt
            else bench.model.batch_hidden(bench.params, batch)
        )
        logits = bench.model.logits(bench.params, x, adapt) if adapt else bench.model.logits(bench.params, x)
        return jax.nn.log_softmax(logits)

    own, base = (np.asarray(logps(each), np.float64) for each in (adapt, None))
    want = np.sum(np.exp(own) * (own - base), axis=-1) * np.asarray(batch.weights_BxT)
    np.testing.assert_allclose(sums.kl, want.sum(), rtol=1e-3)
    # The objective holds its whole loss.
    np.testing.assert_allclose(loss, (sums.nll + 0.5 * sums.kl) / sums.targets, rtol=1e-6)
    assert float(sums.kl) > 1e-4
    fresh = bind(cohort, member(state, 0).adapters, shared)
    np.testing.assert_allclose(objective(bench.params, fresh, batch, None)[2].kl, 0.0, atol=1e-5)


def test_a_users_own_weight_holds_them_near_the_base(bench, random_batch):
    cohort, shared, state = _population(bench, "lora", kl_weight=np.float32([0.0, 1.0, 100.0]))
    objective = sft_with_kl(bench.model)
    step = jax.jit(population_step(cohort, objective, adamw(), constant()))
    batch = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), random_batch(USERS))
    state = state._replace(adapters=jax.tree.map(lambda leaf: leaf.at[:].set(leaf[:1]), state.adapters))
    for _ in range(12):
        state, metrics = step(bench.params, shared, state, batch)
    kl = np.asarray(metrics.sums.kl)
    assert kl[0] > kl[1] > kl[2] >= 0
    plain = jax.jit(member_step(cohort, sft(bench.model), adamw(), constant()))
    free = member(
        init_population(
            cohort, adamw(), jax.random.split(jax.random.key(1), 1), hparams(learning_rate=3e-2, max_steps=50)
        ),
        0,
    )
    for _ in range(12):
        free, _ = plain(bench.params, shared, free, member(batch, 0))
    # Two programs, and twelve of Adam's steps at a rate of 3e-2.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), member(state, 0).adapters, free.adapters)


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan")])
def test_a_budget_is_above_zero(budget):
    with pytest.raises(ConfigError, match="norm_budget"):
        hparams(learning_rate=1e-3, max_steps=1, norm_budget=budget)


@pytest.mark.parametrize("weight", [-0.1, float("inf")])
def test_a_kl_weight_is_a_finite_number(weight):
    with pytest.raises(ConfigError, match="kl_weight"):
        hparams(learning_rate=1e-3, max_steps=1, kl_weight=weight)


@pytest.mark.parametrize(
    ("config", "kind", "words"),
    [
        (AdapterConfig(method="dora"), "frobenius", "dora"),
        (AdapterConfig(init="pissa"), "frobenius", "pissa"),
        (AdapterConfig(method="ia3"), "spectral", "ia3"),
        (AdapterConfig(), "nuclear", "nuclear"),
    ],
)
def test_what_has_no_budget_says_so(bench, config, kind, words):
    cohort = Cohort.of(config, bench.model.sites())
    with pytest.raises(ConfigError, match=words):
        member_step(cohort, sft(bench.model), adamw(), constant(), weight=bench.model.site_weight, budget=kind)


def test_lora_plus_multiplies_bs_own_steps(bench, random_batch):
    """With plain gradient descent B's step is 16 times as long, and A's the same."""
    from popax.population.optimizer import sgd

    states = []
    for rate in (1.0, 16.0):
        cohort = bench.cohort("lora", options={"b_rate": rate})
        keys = jax.random.split(jax.random.key(1), USERS)
        state = init_population(cohort, sgd(), keys, hparams(learning_rate=1e-2, max_steps=9))
        step = jax.jit(population_step(cohort, sft(bench.model), sgd(), constant()))
        states.append((state, step(bench.params, {}, state, random_batch(USERS))[0]))
    (start, plain), (_, plus) = states
    for site, leaves in start.adapters.items():
        np.testing.assert_allclose(plus.adapters[site]["b"], 16.0 * plain.adapters[site]["b"], rtol=1e-5)
        np.testing.assert_array_equal(plus.adapters[site]["a"], plain.adapters[site]["a"])
        assert np.any(np.asarray(leaves["a"]))
