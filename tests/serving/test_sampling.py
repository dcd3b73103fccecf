"""Sampling against its closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.errors import ConfigError
from popax.serving.sampling import History, Sampling, SamplingRows, penalised, sample, sample_rows

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


def test_min_p_keeps_what_is_likely_beside_the_likeliest():
    """arXiv 2407.01082: at least min_p times the largest probability (0.4): 0.3 of it is 0.12."""
    rule = Sampling(temperature=1.0, min_p=0.3)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(sample(rule, keys, jnp.log(jnp.broadcast_to(jnp.asarray(PROBS, jnp.float32), (4000, 5)))))
    assert set(drawn.tolist()) == set(np.flatnonzero(0.3 * PROBS.max() <= PROBS).tolist())


def test_penalties_by_their_formulas():
    """OpenAI's: logit - count * frequency - (count > 0) * presence, of generated tokens. CTRL's (arXiv 1909.05858):
    logit / repetition where positive, else times it, of the prompt's too."""
    logits = np.array([[2.0, -1.0, 0.5, 3.0, -2.0], [2.0, -1.0, 0.5, 3.0, -2.0]], np.float32)
    rules = [Sampling(presence=0.5, frequency=0.25, repetition=2.0), Sampling()]
    history = History(np.array([[0, 1, 3, 3, 4, -1], [0, 1, 3, 3, 4, -1]], np.int32), np.array([2, 2], np.int32))
    found = np.asarray(penalised(SamplingRows.of(rules), history, jnp.asarray(logits)))
    repeated = np.where(logits[0] > 0, logits[0] / 2, logits[0] * 2)
    repeated[2] = 0.5  # never seen
    counts = np.array([0, 0, 0, 2, 1], np.float32)
    np.testing.assert_allclose(found[0], repeated - 0.25 * counts - 0.5 * (counts > 0), rtol=1e-6)
    np.testing.assert_array_equal(found[1], logits[1])


def test_rows_of_different_rules_are_each_rule_alone():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(6, 40)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 6)
    rules = [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(temperature=1.0, top_k=3),
        Sampling(temperature=2.0, top_p=0.5),
    ]
    rules += [Sampling(temperature=1.0, min_p=0.4), Sampling(temperature=1.5, top_k=9, top_p=0.8, min_p=0.01)]
    together = np.asarray(sample_rows(SamplingRows.of(rules), keys, logits))
    alone = [int(sample(rule, keys[at : at + 1], logits[at : at + 1])[0]) for at, rule in enumerate(rules)]
    assert together.tolist() == alone
