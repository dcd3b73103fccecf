"""Dispatch: the base's own answer in longhand, and a classifier at the minimum of its loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.data.tokenize import load_tokenizer
from popax.errors import DataError
from popax.evaluation.dispatch import ClassifierConfig, by_prompt, features, fitted
from popax.modeling.base import new_base
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.types import Batch


@pytest.fixture(scope="module")
def base():
    shape = {"embed_dim": 16, "ffw_dim": 24, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    model = Model(ModelConfig(vocab_size=264, max_seq_len=128, **shape))
    return new_base(model, model.init(jax.random.key(0)), source="random weights")


def test_the_base_is_asked_for_each_label(base):
    tokenizer, question = load_tokenizer("byte"), "{text}|{labels}|"
    own = by_prompt(base, tokenizer, "{labels}", ["law", "chemistry"], question)
    for label, logp in zip(("law", "chemistry"), own, strict=True):
        before, after = (tokenizer.encode(each).ids.tolist() for each in ("{labels}|law, chemistry|", f" {label}"))
        before = [tokenizer.bos_id, *before]  # as before any prompt
        tokens = [*before, *after]
        logps = jax.nn.log_softmax(base.model(base.params, jnp.asarray([tokens]))[0])
        wanted = sum(float(logps[at - 1, tokens[at]]) for at in range(len(before), len(tokens)))
        np.testing.assert_allclose(logp, wanted, rtol=1e-4)


@pytest.mark.parametrize(
    ("text", "labels", "words"), [("a", ["law"], "at least two"), ("a" * 200, ["x", "y"], "context 128: shorten")]
)
def test_what_cannot_be_asked_is_refused(base, text, labels, words):
    with pytest.raises(DataError, match=words):
        by_prompt(base, load_tokenizer("byte"), text, labels)


def test_features_are_means_over_tokens_and_padding_says_nothing(base):
    tokens = np.random.default_rng(0).integers(0, 264, (2, 6)).astype(np.int32)
    segments = np.array([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]], np.int32)
    places = np.where(segments > 0, np.arange(6)[None], 0).astype(np.int32)
    batch = Batch(tokens, tokens, segments.astype(np.float32), places, segments, np.ones_like(tokens))
    own = features(base.model, base.params, batch)
    hidden, _ = base.model.hidden(base.params, tokens[:1, :4])
    np.testing.assert_allclose(own[0], hidden[0].mean(0), rtol=1e-5, atol=1e-6)
    assert not np.any(np.asarray(own[1]))


def test_two_clouds_are_told_apart_and_the_gradient_is_zero():
    """At the minimum of sum_n w_n nats_n + l2 |w|^2: X^T (p - y) / n + 2 l2 w = 0, in the scaled features."""
    rng, config = np.random.default_rng(0), ClassifierConfig(l2=0.02, steps=60)
    labels = np.arange(90) % 3
    centres = np.array([[2.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, -2.0]])
    x = (centres[labels] + rng.standard_normal((90, 4))).astype(np.float32)
    own = fitted(jnp.asarray(x), jnp.asarray(labels), 3, config)
    logps = np.asarray(own(jnp.asarray(x)), np.float64)
    assert np.mean(np.argmax(logps, axis=1) == labels) > 0.85
    scaled = (x - x.mean(0)) / x.std(0)
    error = np.exp(logps) - np.eye(3)[labels]
    np.testing.assert_allclose(scaled.T @ error / 90 + 2 * config.l2 * np.asarray(own.w_DxK), 0, atol=2e-4)
    np.testing.assert_allclose(error.mean(0), 0, atol=2e-4)


def test_a_class_without_a_row_is_named():
    with pytest.raises(DataError, match=r"\[2, 0\]"):
        fitted(jnp.ones((2, 3)), jnp.asarray([0, 0]), 2, ClassifierConfig())
