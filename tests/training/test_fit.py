"""The one loop: which steps it takes, when it validates, and what it does with batches that nobody wants."""

import threading

import numpy as np
import pytest

from popax.population.step import StepMetrics
from popax.training.console import round_metrics
from popax.training.fit import BatchesAhead, fit


def run(steps, **options):
    """What happened, in order; the state counts steps."""
    said = []

    def step(state, batch):
        assert batch == 10 * state
        said.append(state)
        return state + 1, f"metrics {state}"

    def observe(state):
        said.append(f"look {state}")
        return state

    options = {"observe": observe} | options
    with BatchesAhead(lambda key: 10 * key) as batches:
        end = fit(options.get("begins", 0), steps=steps, step=step, batches=batches, **options)
    return end, said


def test_it_validates_at_the_start_at_intervals_and_at_the_end():
    assert run(5, every=2) == (5, ["look 0", 0, 1, "look 2", 2, 3, "look 4", 4, "look 5"])
    assert run(4, every=2)[1][-2:] == [3, "look 4"]
    assert run(0, every=2) == (0, ["look 0"])
    assert run(3, observe=None) == (3, [0, 1, 2])


def test_it_goes_on_where_it_was():
    assert run(5, every=10, begins=3) == (5, [3, 4, "look 5"])


def test_it_ends_where_it_is_over_or_stopped():
    assert run(9, every=2, over=lambda state: state >= 4) == (4, ["look 0", 0, 1, "look 2", 2, 3, "look 4"])
    asked = iter([False, False, True])
    assert run(9, observe=None, stop=lambda: next(asked)) == (2, [0, 1])


def test_each_step_is_told_with_its_metrics():
    told = []
    run(2, observe=None, on_step=lambda *step: told.append(step))
    assert told == [(1, 1, "metrics 0"), (2, 2, "metrics 1")]


def test_the_next_batch_is_built_while_a_step_runs():
    built, reached = threading.Event(), []

    def make(key):
        if key == 1:
            built.set()
        return key

    def step(state, batch):
        reached.append(built.wait(10))
        return state + 1, None

    with BatchesAhead(make) as batches:
        fit(0, steps=1, step=step, batches=batches, continues=True)
        assert reached == [True]
        assert batches.take(1) == 1


def test_metrics_of_ones_own_do_not_stand_in_for_the_runs():
    """A dictionary may hold what is no number, and names that are taken."""
    ones = np.ones(2, np.float32)
    sums = {"loss": 9 * ones, "hard": 4 * ones, "by_layer": {"first": ones}}
    step = StepMetrics(3 * ones, 2 * ones, ones, ones, np.array([True, False]), np.array([False, True]), sums)
    found = round_metrics([step, step])
    assert (found["loss"], found["hard"], found["targets"]) == (3.0, 2.0, 4.0)
    assert (found["users_training"], found["skipped_steps"]) == (1.0, 2.0)
    assert "by_layer" not in found


def test_a_wanted_batch_that_is_never_taken_has_no_effect():
    def make(key):
        if key < 0:
            raise ValueError(f"no batch {key}")
        return key

    with BatchesAhead(make, kept=2) as batches:
        for key in (-1, -2, 3, 4):
            batches.want(key)
        assert batches.take(5) == 5
        assert batches.take(4) == 4
        with pytest.raises(ValueError, match="no batch -3"):
            batches.take(-3)
