"""A user keeps the adapter of their best validation, and stops when it no longer improves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.errors import ConfigError, PopulationError
from popax.objectives.base import Sums
from popax.population.early_stop import EarlyStop, observe
from popax.population.optimizer import adamw
from popax.population.state import empty_population, hparams, init_population, selected_adapters

RULE = EarlyStop(every=1, patience=2)


@pytest.fixture
def cohort(bench):
    return bench.cohort("lora_xs")


def population(cohort, users, **options):
    keys = jax.random.split(jax.random.key(0), users)
    return init_population(cohort, adamw(), keys, hparams(learning_rate=1e-3, max_steps=50), **options)


def losses(values, targets=1.0):
    values = jnp.asarray(values, jnp.float32)
    return Sums(values, jnp.full(values.shape, targets, jnp.float32), jnp.ones(values.shape, jnp.float32))


def moved(state, by):
    """One step later, with adapters that show at which step they are."""
    return state._replace(
        step=state.step + state.active.astype(jnp.int32),
        adapters=jax.tree.map(lambda leaf: jnp.full_like(leaf, by), state.adapters),
    )


def test_the_best_adapter_is_kept_and_patience_is_each_users_own(cohort):
    state = observe(RULE, population(cohort, 3, track_best=True), losses([5.0, 5.0, 5.0]))
    for step, values in enumerate([[4.0, 6.0, 4.0], [3.0, 7.0, jnp.nan], [2.0, 1.0, jnp.nan]], start=1):
        state = observe(RULE, moved(state, step), losses(values))
    assert state.active.tolist() == [True, False, False]
    assert state.best.step.tolist() == [3, 0, 1]
    kept = jax.tree.leaves(selected_adapters(state))[0]
    assert float(kept[0].max()) == 3.0
    assert not np.asarray(kept[1]).any(), "user 1 was best at the start, which is zero"
    assert float(kept[2].max()) == 1.0


def test_a_user_without_validation_keeps_the_latest_adapter_and_never_stops(cohort):
    state = population(cohort, 1, track_best=True)
    for step in range(6):
        state = observe(RULE, moved(state, step), losses([0.0], targets=0.0))
    assert state.active.tolist() == [True]
    assert float(jax.tree.leaves(selected_adapters(state))[0].max()) == 5.0


def test_a_finished_member_and_an_unused_slot_meet_validations_unchanged(cohort):
    state = observe(RULE, population(cohort, 2, track_best=True), losses([5.0, 5.0]))
    state = state._replace(active=jnp.asarray([False, True]))
    later = observe(RULE, state, losses([1.0, 9.0]))
    jax.tree.map(np.testing.assert_array_equal, later, state)
    empty = empty_population(cohort, adamw(), 2, track_best=True)
    jax.tree.map(np.testing.assert_array_equal, observe(RULE, empty, losses([0.0, 0.0], targets=0.0)), empty)


def test_bad_use_is_named(cohort):
    with pytest.raises(PopulationError, match="track_best=True"):
        observe(RULE, population(cohort, 1), losses([1.0]))
    with pytest.raises(ConfigError, match="patience=0"):
        EarlyStop(patience=0)
