"""Sampling against its closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.errors import ConfigError
from popax.serving.sampling import Sampling, sample

DRAWS = 20_000
PROBS = np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32)


def frequencies(rule: Sampling, probs=PROBS) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), DRAWS)
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probs)), (DRAWS, len(probs)))
    return np.bincount(np.asarray(jax.jit(sample, static_argnums=0)(rule, keys, logits)), minlength=len(probs)) / DRAWS


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Sampling(temperature=1.0), PROBS),
        (Sampling(temperature=2.0), PROBS**0.5 / np.sum(PROBS**0.5)),
        (Sampling(temperature=0.5), PROBS**2 / np.sum(PROBS**2)),
        (Sampling(temperature=1.0, top_k=2), np.array([4, 3, 0, 0, 0]) / 7),
        (Sampling(temperature=1.0, top_k=99), PROBS),
        (Sampling(temperature=1.0, top_p=0.65), np.array([4, 3, 0, 0, 0]) / 7),
        (Sampling(temperature=1.0, top_p=0.75), np.array([40, 30, 15, 0, 0]) / 85),
        (Sampling(temperature=1.0, top_p=0.1), np.array([1, 0, 0, 0, 0])),
        # The nucleus is of what top_k left: 0.4/0.85 alone does not reach 0.5.
        (Sampling(temperature=1.0, top_k=3, top_p=0.5), np.array([4, 3, 0, 0, 0]) / 7),
        (Sampling(temperature=0.0), np.array([1, 0, 0, 0, 0])),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_they_should(rule, expected):
    found = frequencies(rule)
    # Five standard deviations of a frequency, and exactly none of what is cut away.
    tolerance = 5 * np.sqrt(expected * (1 - expected) / DRAWS)
    assert np.all(np.abs(found - expected) <= tolerance + 1e-12), (found, expected)


def test_the_order_of_the_vocabulary_does_not_matter():
    shuffled = np.array([3, 0, 4, 1, 2])
    rule = Sampling(temperature=1.0, top_p=0.75)
    assert set(np.flatnonzero(frequencies(rule, PROBS[shuffled]))) == {1, 3, 4}


def test_a_row_draws_from_its_own_key():
    keys = jax.random.split(jax.random.key(1), 6)
    logits = jax.random.normal(jax.random.key(2), (6, 30))
    rule = Sampling(temperature=1.0, top_k=10, top_p=0.9)
    together = sample(rule, keys, logits)
    alone = [int(sample(rule, keys[i : i + 1], logits[i : i + 1])[0]) for i in range(6)]
    assert together.tolist() == alone
    assert together.dtype == jnp.int32


@pytest.mark.parametrize("wrong", [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_what_is_out_of_range_is_named(wrong):
    (name, value) = next(iter(wrong.items()))
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        Sampling(**wrong)
