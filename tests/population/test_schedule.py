"""Schedules by their formulas, and that an optimizer is what its arguments say. Factors on rates and on gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from popax.population.optimizer import (
    adamw,
    at_rates,
    clip_by_global_norm,
    constant,
    lion,
    settings_of,
    sgd,
    warmup_constant,
    warmup_cosine,
)
from popax.population.state import hparams

LONG = 100_000  # steps, of which one is nothing


def factors(schedule, steps, max_steps):
    """The factor at each of these steps, in one call."""
    return np.asarray(jax.vmap(lambda step: schedule(step, jnp.int32(max_steps)))(jnp.asarray(steps, jnp.int32)))


def test_constant_is_one():
    factor = constant()(jnp.int32(3), jnp.int32(9))
    assert (factor.shape, factor.dtype, float(factor)) == ((), jnp.float32, 1.0)


def test_warmup_constant_climbs_by_equal_steps_to_one_and_stays():
    for max_steps in (6, 60):  # whatever the number of steps
        found = factors(warmup_constant(warmup_steps=4), range(6), max_steps)
        np.testing.assert_allclose(found, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_without_a_warmup_the_first_step_has_the_whole_rate(warmup_steps):
    with jax.debug_infs(True):  # and nothing is divided by 0 on the way
        assert factors(warmup_constant(warmup_steps=warmup_steps), [0, 1], 9).tolist() == [1.0, 1.0]


def test_warmup_cosine_climbs_by_equal_steps_over_its_fraction():
    found = factors(warmup_cosine(warmup_fraction=0.5, floor=0.2), range(10), 20)
    np.testing.assert_allclose(found, np.arange(1, 11) / 10, rtol=1e-6)


@pytest.mark.parametrize(("fraction", "floor"), [(0.25, 0.0), (0.25, 0.2), (0.0, 0.0)])
def test_warmup_cosine_is_half_a_cosine_from_one_to_its_floor(fraction, floor):
    """(1 + cos(pi p)) / 2, of the way from 1 down to the floor: where p is 0, 1/3, 1/2, 2/3 and 1."""
    after = np.asarray([0.0, 1 / 3, 0.5, 2 / 3, 1.0])
    steps = np.minimum((fraction + (1 - fraction) * after) * LONG, LONG - 1)
    found = factors(warmup_cosine(warmup_fraction=fraction, floor=floor), steps, LONG)
    np.testing.assert_allclose(found, floor + (1 - floor) * np.asarray([1.0, 0.75, 0.5, 0.25, 0.0]), atol=1e-4)


def test_warmup_cosine_only_falls_after_the_warmup_and_stays_between_one_and_its_floor():
    found = factors(warmup_cosine(warmup_fraction=0.1, floor=0.3), range(50), 50)
    assert found.argmax() == 4
    assert found[5] == found[4]  # the cosine begins where the warm-up has ended
    assert np.all(np.diff(found[5:]) < 0)
    assert found.max() == pytest.approx(1.0)
    assert np.all(found[4:] >= 0.3 - 1e-6)


def test_all_warmup_ends_at_one():
    found = factors(warmup_cosine(warmup_fraction=1.0), [0, 4, 8], 10)
    np.testing.assert_allclose(found, [0.1, 0.5, 0.9], rtol=1e-6)
    assert factors(warmup_cosine(warmup_fraction=1.0), [0], 1).tolist() == [1.0]


def test_a_slot_without_steps_has_a_finite_factor():
    """An unused slot computes as all do: max_steps is 0 there."""
    assert np.isfinite(factors(warmup_cosine(), [0], 0)).all()


GRADS, START, RATE = np.float32([0.5, -2.0]), np.float32([1.0, 4.0]), 0.125


def after(optimizer, steps=2):
    """START after these steps along GRADS, and then one against them, each taken by itself."""
    own = settings_of(optimizer, hparams(learning_rate=RATE, max_steps=9))
    transformation, params = optimizer(own), {"w": jnp.asarray(START)}
    state = transformation.init(params)
    for sign in [*[1.0] * steps, -1.0]:
        grads = {"w": jnp.asarray(np.float32(sign) * GRADS)}
        with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic
            updates, state = transformation.update(grads, state, params)
            params = optax.apply_updates(params, updates)
    return np.asarray(params["w"])


def adam_by_hand(b1, b2, eps, decay, steps=2):
    """Algorithm 2 of arXiv 1711.05101."""
    theta, m, v = START, 0.0, 0.0
    for t, sign in enumerate([*[1.0] * steps, -1.0], start=1):
        g = sign * GRADS
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        theta = theta - RATE * ((m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * theta)
    return theta


def lion_by_hand(b1, b2, decay, steps):
    """Algorithm 2 of arXiv 2302.06675."""
    theta, m = START, 0.0
    for sign in [*[1.0] * steps, -1.0]:
        g = sign * GRADS
        theta = theta - RATE * (np.sign(b1 * m + (1 - b1) * g) + decay * theta)
        m = b2 * m + (1 - b2) * g
    return theta


@pytest.mark.parametrize("settings", [(0.9, 0.999, 1e-8, 0.0), (0.5, 0.9, 0.1, 0.25)])
def test_adamw_is_the_published_one_with_its_own_settings(settings):
    b1, b2, eps, decay = settings
    own = adamw(b1=b1, b2=b2, eps=eps, weight_decay=decay)
    np.testing.assert_allclose(after(own), adam_by_hand(*settings), rtol=1e-5)


# The last gradient is against the others: b1 says how much it weighs beside them, b2 how much of them is still known.
@pytest.mark.parametrize("settings", [(0.9, 0.99, 0.0), (0.9, 0.5, 0.25), (0.2, 0.5, 0.0)])
def test_lion_is_the_published_one_with_its_own_settings(settings):
    b1, b2, decay = settings
    found = after(lion(b1=b1, b2=b2, weight_decay=decay), steps=4)
    np.testing.assert_allclose(found, lion_by_hand(*settings, steps=4), rtol=1e-5)


def test_sgd_has_the_momentum_it_is_given():
    np.testing.assert_allclose(after(sgd()), START - RATE * GRADS)  # two steps there, one back
    # Heavy ball: the velocities are g, 1.5 g, -0.25 g.
    np.testing.assert_allclose(after(sgd(momentum=0.5)), START - RATE * (1 + 1.5 - 0.25) * GRADS)


def test_a_factor_on_a_rate_is_that_leafs_alone():
    updates = {"one": {"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray([3.0])}, "two": {"b": jnp.asarray([5.0])}}
    found = at_rates(updates, {"b": 16.0})
    assert found["one"]["a"].tolist() == [1.0, 2.0]
    assert (found["one"]["b"].tolist(), found["two"]["b"].tolist()) == ([48.0], [80.0])
    assert at_rates(updates, {}) is updates


@pytest.mark.parametrize(("max_norm", "factor"), [(6.5, 0.5), (13.0, 1.0), (26.0, 1.0), (np.inf, 1.0), (0.0, 0.0)])
def test_gradients_are_clipped_by_the_norm_of_all_of_them(max_norm, factor):
    grads = {"a": jnp.asarray([3.0, 4.0]), "b": jnp.asarray([[12.0]])}
    clipped, norm = clip_by_global_norm(grads, jnp.float32(max_norm))
    assert float(norm) == 13.0
    np.testing.assert_allclose(clipped["a"], [3.0 * factor, 4.0 * factor])
    np.testing.assert_allclose(clipped["b"], [[12.0 * factor]])


def test_no_gradient_is_clipped_to_none():
    clipped, norm = clip_by_global_norm({"a": jnp.zeros(2)}, jnp.float32(0.0))
    assert float(norm) == 0.0
    assert clipped["a"].tolist() == [0.0, 0.0]
