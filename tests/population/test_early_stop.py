"""A user keeps the adapter of their best validation, and stops when it no longer improves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.errors import ConfigError, PopulationError
from popax.objectives.base import LossSums
from popax.population.early_stop import EarlyStop, observe
from popax.population.optimizer import adamw
from popax.population.state import empty_population, hparams, init_population, selected_adapters
from popax.types import SiteInfo

RULE = EarlyStop(every=1, patience=2)


# One site of one number: what early stopping decides does not depend on what an adapter is.
SITE = SiteInfo(name="layers.attn.q_proj", d_in=1, d_out=1, layers=1, axes=("embed", "heads"))


@pytest.fixture(scope="module")
def cohort():
    return Cohort.of(AdapterConfig(method="lora_xs", rank=1, targets=(SITE.name,)), {SITE.name: SITE})


def population(cohort, users, **options):
    keys = jax.random.split(jax.random.key(0), users)
    settings = hparams(learning_rate=1e-3, max_steps=50)
    return jax.jit(lambda keys: init_population(cohort, adamw(), keys, settings, **options))(keys)


look = jax.jit(observe, static_argnums=0)  # eagerly, each of its operations would be compiled by itself


def losses(values, targets=1.0):
    values = jnp.asarray(values, jnp.float32)
    return LossSums(values, jnp.full(values.shape, targets, jnp.float32), jnp.ones(values.shape, jnp.float32))


def moved(state, by):
    """One step later, with adapters that show at which step they are."""
    return state._replace(
        step=state.step + state.active.astype(jnp.int32),
        adapters=jax.tree.map(lambda leaf: jnp.full_like(leaf, by), state.adapters),
    )


def adapter_of(best):
    """The number that `moved` has put into each user's best adapter."""
    [leaf] = jax.tree.leaves(best.adapter)
    return np.asarray(leaf).reshape(-1).tolist()


def follow(cohort, rule, validations, targets=1.0, **options):
    """The state after each validation; nats[step][user], the first before the first step."""
    state = population(cohort, len(validations[0]), track_best=True, **options)
    states = [look(rule, state, losses(validations[0], targets))]
    for step, values in enumerate(validations[1:], start=1):
        states.append(look(rule, moved(states[-1], float(step)), losses(values, targets)))
    return states


def test_a_gain_is_more_than_min_delta(cohort):
    """Half a nat is asked for: a user who gains more each time goes on, one who gains less or just so much stops."""
    rule = EarlyStop(every=1, patience=2, min_delta=0.5)
    states = follow(cohort, rule, [[9.0, 9.0, 9.0], [8.0, 8.75, 8.5], [7.0, 8.625, 8.5]])
    assert states[-1].active.tolist() == [True, False, False]
    assert states[-1].best.step.tolist() == [2, 0, 0]
    assert states[-1].best.loss.tolist() == [7.0, 9.0, 9.0]
    assert states[-1].best.stale.tolist() == [0, 2, 2]
    assert adapter_of(states[-1].best) == [2.0, 0.0, 0.0]


def test_small_gains_add_up_to_one_that_counts(cohort):
    """Against the best that was kept, not against the validation before."""
    rule = EarlyStop(every=1, patience=3, min_delta=0.5)
    states = follow(cohort, rule, [[9.0], [8.75], [8.25], [8.0]])
    assert [state.best.loss.item() for state in states] == [9.0, 9.0, 8.25, 8.25]
    assert [state.best.stale.item() for state in states] == [0, 1, 0, 1]


def test_patience_begins_anew_with_every_gain(cohort):
    """Two validations without a gain, a gain, and two more: of a patience of three, nobody has stopped."""
    rule = EarlyStop(every=1, patience=3)
    states = follow(cohort, rule, [[9.0], [9.0], [9.0], [8.0], [8.0], [8.0], [8.0]])
    assert [state.best.stale.item() for state in states] == [0, 1, 2, 0, 1, 2, 3]
    assert [state.active.item() for state in states] == [True] * 6 + [False]
    assert states[-1].best.step.item() == 3


def test_the_loss_is_of_a_target(cohort):
    """More targets and more nats: per target it is a gain. What is compared is not the sum."""
    state = look(RULE, population(cohort, 2, track_best=True), losses([8.0, 0.5], targets=2.0))
    state = look(RULE, moved(state, 1.0), losses([12.0, 0.75], targets=4.0))
    assert state.best.loss.tolist() == [3.0, 0.1875]
    assert state.best.step.tolist() == [1, 1]
    assert state.best.stale.tolist() == [0, 0]


def test_who_has_no_targets_once_keeps_the_latest_and_their_best_loss(cohort):
    state = look(RULE, population(cohort, 1, track_best=True), losses([2.0]))
    state = look(RULE, moved(state, 1.0), losses([0.0], targets=0.0))
    assert (state.best.loss.tolist(), state.best.step.tolist(), adapter_of(state.best)) == ([2.0], [1], [1.0])
    state = look(RULE, moved(state, 2.0), losses([3.0]))
    assert (state.best.step.tolist(), state.best.stale.tolist()) == ([1], [1])


def test_no_targets_are_no_loss_that_could_be_too_small_a_gain(cohort):
    rule = EarlyStop(every=1, patience=1, min_delta=0.5)
    state = look(rule, population(cohort, 1, track_best=True), losses([0.25]))
    with jax.debug_nans(True):  # nothing is divided by 0 on the way
        state = observe(rule, moved(state, 1.0), losses([0.0], targets=0.0))
    assert (state.best.step.tolist(), state.active.tolist()) == ([1], [True])


def test_each_step_counts_once(cohort):
    """A second validation of the same step is none; the step of the latest one is kept."""
    states = follow(cohort, RULE, [[5.0], [6.0]])
    assert [state.best.checked.tolist() for state in states] == [[0], [1]]
    again = look(RULE, states[-1], losses([1.0]))
    jax.tree.map(np.testing.assert_array_equal, again, states[-1])


def test_the_optimizers_state_is_kept_with_the_adapter(cohort):
    def with_count(state, count):
        return state._replace(opt_state=jax.tree.map(lambda leaf: jnp.full_like(leaf, count), state.opt_state))

    state = look(RULE, population(cohort, 2, track_best=True, save_optimizer_state=True), losses([5.0, 5.0]))
    state = look(RULE, with_count(moved(state, 1.0), 1), losses([4.0, 6.0]))
    leaves = jax.tree.leaves(state.best.opt_state)
    assert len(leaves) == len(jax.tree.leaves(state.opt_state)) > 1
    assert all(np.asarray(leaf).reshape(2, -1).max(axis=1).tolist() == [1, 0] for leaf in leaves)
    assert follow(cohort, RULE, [[5.0], [4.0]])[-1].best.opt_state is None


@pytest.mark.parametrize("wrong", [{"every": 0}, {"patience": 0}, {"every": -1, "patience": 2}])
def test_a_rule_that_is_none_is_refused(wrong):
    with pytest.raises(ConfigError, match="both are at least 1"):
        EarlyStop(**wrong)
    assert EarlyStop(every=1, patience=1).patience == 1


def test_the_best_adapter_is_kept_and_patience_is_each_users_own(cohort):
    state = look(RULE, population(cohort, 3, track_best=True), losses([5.0, 5.0, 5.0]))
    for step, values in enumerate([[4.0, 6.0, 4.0], [3.0, 7.0, jnp.nan], [2.0, 1.0, jnp.nan]], start=1):
        state = look(RULE, moved(state, step), losses(values))
    assert state.active.tolist() == [True, False, False]
    assert state.best.step.tolist() == [3, 0, 1]
    kept = jax.tree.leaves(selected_adapters(state))[0]
    assert float(kept[0].max()) == 3.0
    assert not np.asarray(kept[1]).any(), "user 1 was best at the start, which is zero"
    assert float(kept[2].max()) == 1.0


def test_a_user_without_validation_keeps_the_latest_adapter_and_never_stops(cohort):
    state = population(cohort, 1, track_best=True)
    for step in range(6):
        state = look(RULE, moved(state, step), losses([0.0], targets=0.0))
    assert state.active.tolist() == [True]
    assert float(jax.tree.leaves(selected_adapters(state))[0].max()) == 5.0


def test_a_finished_member_and_an_unused_slot_meet_validations_unchanged(cohort):
    state = look(RULE, population(cohort, 2, track_best=True), losses([5.0, 5.0]))
    state = state._replace(active=jnp.asarray([False, True]))
    later = look(RULE, state, losses([1.0, 9.0]))
    jax.tree.map(np.testing.assert_array_equal, later, state)
    empty = empty_population(cohort, adamw(), 2, track_best=True)
    jax.tree.map(np.testing.assert_array_equal, look(RULE, empty, losses([0.0, 0.0], targets=0.0)), empty)


def test_bad_use_is_named(cohort):
    with pytest.raises(PopulationError, match="track_best=True"):
        observe(RULE, population(cohort, 1), losses([1.0]))
    with pytest.raises(ConfigError, match="patience=0"):
        EarlyStop(patience=0)
