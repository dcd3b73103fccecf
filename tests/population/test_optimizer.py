"""Rates and optimizers of one user: every step that is taken has a rate, and what cannot be one is refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popax.errors import ConfigError
from popax.population.early_stop import EarlyStop
from popax.population.optimizer import adamw, check_factors, constant, lion, warmup_constant, warmup_cosine
from popax.training.config import TrainConfig
from popax.training.pretrain import PretrainConfig, optimizer

FRACTIONS = st.sampled_from([0.0, 0.1, 0.5, 1.0]) | st.floats(0.0, 1.0)
SCHEDULES = {
    "constant": st.just(constant()),
    "warmup_constant": st.builds(lambda steps: warmup_constant(warmup_steps=steps), st.integers(0, 50)),
    "warmup_cosine": st.builds(lambda warm, end: warmup_cosine(warmup_fraction=warm, floor=end), FRACTIONS, FRACTIONS),
}


def factors(schedule, total):
    """Of every step that a user of `total` steps takes."""
    at = jnp.arange(total, dtype=jnp.int32)
    return np.asarray(jax.vmap(lambda step: schedule(step, jnp.int32(total)))(at))


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=60)
@given(data=st.data(), total=st.sampled_from([1, 2, 3, 100, 20_000]))
def test_invariant_11_every_step_that_is_taken_has_a_rate(name, data, total):
    found = factors(data.draw(SCHEDULES[name]), total)
    assert np.isfinite(found).all()
    assert (found > 0).all(), f"step {int(np.argmin(found))} of {total} has the factor {found.min()}"
    assert (found <= 1).all()


@settings(max_examples=40)
@given(warm=FRACTIONS, floor=FRACTIONS, total=st.integers(1, 12))
def test_a_cosine_reaches_the_rate_and_falls_towards_its_floor(warm, floor, total):
    """Also for users of one step, and however long the warm-up is said to be."""
    found = factors(warmup_cosine(warmup_fraction=warm, floor=floor), total)
    top = int(np.argmax(found))
    assert found[top] > 0.65
    assert (np.diff(found[: top + 1]) >= 0).all()
    assert (np.diff(found[top:]) <= 0).all()
    assert found[-1] >= min(floor, found[top])


def test_the_published_cosine():
    """Half a cosine over the steps after the warm-up (arXiv 1608.03983, eq. 5); its end is one step after the last."""
    found = factors(warmup_cosine(warmup_fraction=0.25, floor=0.2), 8)
    after = np.arange(6) / 6
    np.testing.assert_allclose(found[:2], [0.5, 1.0], rtol=1e-6)
    np.testing.assert_allclose(found[2:], 0.2 + 0.4 * (1 + np.cos(np.pi * after)), rtol=1e-5)


def test_pretraining_takes_no_step_without_a_rate():
    """The first update of Adam is the rate itself, whatever the gradient."""
    transform = optimizer(PretrainConfig(steps=10, warmup_steps=4, learning_rate=0.5, weight_decay=0.0))
    params = {"kernel": jnp.ones(3)}
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic
        updates, _ = transform.update({"kernel": jnp.full(3, 0.1)}, transform.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.5 / 4, rtol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"optimizer": optax.adamw(1e-3)}, r"optimizer: an optax transformation has a rate of its own"),
        ({"optimizer": adamw}, r"adamw itself, without \(\), is none"),
        ({"schedule": optax.cosine_decay_schedule(1.0, 10)}, r"a function \(step, max_steps\)"),
        ({"schedule": 0.5}, r"schedule=0.5: a function \(step, max_steps\)"),
        ({"learning_rate": optax.constant_schedule(1e-3)}, r"TrainConfig.learning_rate=.* is the schedule's"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: a finite number"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
    ],
)
def test_what_is_no_optimizer_schedule_or_rate_is_refused_by_name(wrong, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**wrong)


def test_a_schedule_for_a_rate_of_pretraining_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"PretrainConfig.learning_rate=.* is the schedule's"):
        PretrainConfig(learning_rate=optax.constant_schedule(1e-3))


@pytest.mark.parametrize(
    "wrong", [{"warmup_fraction": 1.5}, {"warmup_fraction": float("nan")}, {"floor": -0.1}, {"floor": 2.0}]
)
def test_the_cosines_numbers_are_fractions(wrong):
    with pytest.raises(ConfigError, match=rf"warmup_cosine.{next(iter(wrong))}=.*: between 0 and 1"):
        warmup_cosine(**wrong)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (lambda step, max_steps: 1.0 - (step + 1) / max_steps, "a user of 1 steps the factor 0.0 at step 0"),
        (lambda step, max_steps: jnp.where(step > 2, jnp.nan, 1.0), "a user of 5 steps the factor nan at step 3"),
    ],
)
def test_a_schedule_of_ones_own_that_leaves_a_step_without_a_rate_is_refused(bench, schedule, words):
    from popax.training.compiled import compile_programs

    config = TrainConfig(schedule=schedule, steps=5, slots=1, early_stop=EarlyStop())
    with pytest.raises(ConfigError, match=words):
        compile_programs(bench.model, bench.cohort("lora"), config)


def test_optimizers_and_schedules_of_ones_own_work():
    TrainConfig(optimizer=optax.adamw, schedule=lambda step, max_steps: 0.5)
    TrainConfig(optimizer=lambda own: optax.chain(optax.clip(1.0), optax.sgd(own.learning_rate)))
    TrainConfig(optimizer=lion(), schedule=warmup_constant(warmup_steps=3))


def test_a_factor_that_is_not_finite_is_refused():
    with pytest.raises(ConfigError, match="the factor inf at step 1"):
        check_factors(lambda step, max_steps: jnp.where(step == 1, jnp.inf, 1.0), 3)
