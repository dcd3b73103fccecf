"""What a run's record keeps of optimizers and schedules: their arguments, so that others are told from them."""

import functools

import optax
import pytest

from popax.population.described import compared, described
from popax.population.optimizer import adamw, as_optimizer, constant, warmup_constant, warmup_cosine


def test_arguments_are_kept():
    assert described(warmup_cosine(warmup_fraction=0.2)) == {
        "name": "warmup_cosine_factor",
        "warmup_fraction": 0.2,
        "floor": 0.0,
    }
    assert described(adamw())["b1"] == 0.9
    assert described(optax.adamw) == "adamw"
    # What a run of an older popax recorded of it, which took a function of the rate alone.
    assert described(as_optimizer(optax.adamw)) == "adamw"
    assert described(functools.partial(optax.sgd, 1e-3)) == {"name": "sgd", "0": 1e-3}


def test_closures_and_defaults_are_arguments():
    def made(rate, nesterov=True):
        return lambda step, max_steps, power=2: rate * power * nesterov

    first, second = described(made(0.5)), described(made(0.25))
    assert (first["rate"], first["nesterov"], first["power"]) == (0.5, True, 2)
    assert first != second
    assert described(optax.cosine_decay_schedule(1.0, 10)) != described(optax.cosine_decay_schedule(1.0, 11))


def test_a_function_that_closes_over_itself_ends():
    def outer():
        def again(step):
            return again(step)

        return again

    assert described(outer())["name"].endswith("again")


@pytest.mark.parametrize(
    ("recorded", "now", "verdict"),
    [
        # As commit 5570f37 wrote them, when schedules were closures.
        ("constant.<locals>.<lambda>", constant(), "same"),
        ("warmup_constant.<locals>.<lambda>", warmup_constant(warmup_steps=3), "unknown"),
        ("warmup_cosine.<locals>.factor", warmup_cosine(), "unknown"),
        ("warmup_cosine.<locals>.factor", constant(), "other"),
        (described(warmup_cosine()), warmup_cosine(), "same"),
        (described(warmup_cosine()), warmup_cosine(warmup_fraction=0.2), "other"),
    ],
)
def test_a_record_is_compared(recorded, now, verdict):
    assert compared(recorded, described(now)) == verdict
