"""Which of several experts a text should have: asked of the base itself, or of a small classifier.

The first two ways of Transformer^2 (arXiv 2501.06252); its third, mixing, is popax.population.mixing.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from popax.data.tokenize import Tokenizer
from popax.errors import DataError
from popax.modeling.base import Base
from popax.modeling.model import Model
from popax.serving.generate import power_of_two
from popax.serving.text import encode_prompt
from popax.types import Batch, Params

QUESTION = "Text: {text}\nWhich of these does the text belong to: {labels}?\nAnswer:"


def by_prompt(
    base: Base, tokenizer: Tokenizer, text: str, labels: Sequence[str], question: str = QUESTION
) -> np.ndarray:
    """log p(label | the question about the text), in nats, of each label: float32 [K]. The largest is the answer.

    question: has {text} and {labels}. A label's probability is over all of its tokens, and its end is not asked for:
    only labels of about the same length are compared fairly. Raises DataError for fewer than two labels, and for a
    question longer than the model's context.
    """
    if len(labels) < 2:
        raise DataError(f"labels={list(labels)}: at least two to choose from")
    # The text last: it may hold anything.
    before = encode_prompt(tokenizer, question.replace("{labels}", ", ".join(labels)).replace("{text}", text))
    after = [tokenizer.encode(" " + label).ids.tolist() for label in labels]
    width = len(before) + max(map(len, after))
    if width > base.model.config.max_seq_len:
        raise DataError(
            f"the question has {width} tokens, the model's context {base.model.config.max_seq_len}: shorten the text"
        )
    width = power_of_two(width)  # few shapes are compiled; later positions are invisible to earlier ones
    tokens = np.zeros((len(labels), width + 1), np.int32)
    weights = np.zeros((len(labels), width), np.float32)
    for row, own in enumerate(after):
        tokens[row, : len(before) + len(own)] = [*before, *own]
        weights[row, len(before) - 1 : len(before) + len(own) - 1] = 1.0
    return np.asarray(_logps(base.model, base.params, tokens[:, :-1], tokens[:, 1:], weights))


@functools.partial(jax.jit, static_argnums=0)
def _logps(model: Model, params: Params, tokens_KxT, targets_KxT, weights_KxT) -> jax.Array:
    x_KxTxD, _ = model.hidden(params, tokens_KxT)
    return -jnp.sum(model.token_nll(params, x_KxTxD, targets_KxT) * weights_KxT, axis=1)


@functools.partial(jax.jit, static_argnums=0)
def features(model: Model, params: Params, batch: Batch) -> jax.Array:
    """The mean of a packed row's last hidden states over its tokens, float32 [B, D]; zeros where a row has none."""
    x_BxTxD = model.batch_hidden(params, batch).astype(jnp.float32)
    real_BxTx1 = (batch.segments_BxT > 0).astype(jnp.float32)[..., None]
    return jnp.sum(x_BxTxD * real_BxTx1, axis=1) / jnp.maximum(jnp.sum(real_BxTx1, axis=1), 1.0)


class Classifier(NamedTuple):
    """log p(k | features) = log softmax(((features - mean) / spread) w + bias)."""

    mean_D: jax.Array
    spread_D: jax.Array
    w_DxK: jax.Array
    bias_K: jax.Array

    def __call__(self, features_BxD: jax.Array) -> jax.Array:
        """float32 [B, K]."""
        scaled = (features_BxD - self.mean_D[None]) / self.spread_D[None]
        return jax.nn.log_softmax(scaled @ self.w_DxK + self.bias_K[None], axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """l2: a penalty on the squares of all weights, in nats. steps: of L-BFGS, from zero."""

    l2: float = 0.01
    steps: int = 100


def fitted(features_NxD: jax.Array, labels_N: jax.Array, classes: int, config: ClassifierConfig) -> Classifier:
    """Multinomial logistic regression, every class weighing the same however many rows it has.

    Raises DataError where a class has no row.
    """
    counts_K = np.bincount(np.asarray(labels_N), minlength=classes)
    if counts_K.min() == 0 or len(counts_K) > classes:
        raise DataError(
            f"rows of each class: {counts_K.tolist()}; every one of {classes} needs one, and no other has any"
        )
    mean_D, spread_D = jnp.mean(features_NxD, axis=0), jnp.maximum(jnp.std(features_NxD, axis=0), 1e-6)
    weight_N = jnp.asarray(1.0 / (classes * counts_K), jnp.float32)[labels_N]

    def loss(own: Classifier) -> jax.Array:
        logps_NxK = own(features_NxD)
        nats = -jnp.take_along_axis(logps_NxK, labels_N[:, None], axis=1)[:, 0]
        return jnp.sum(nats * weight_N) + config.l2 * jnp.sum(jnp.square(own.w_DxK))

    start = Classifier(mean_D, spread_D, jnp.zeros((features_NxD.shape[1], classes)), jnp.zeros(classes))
    return _minimised(loss, start, config.steps)


def _minimised(loss, start: Classifier, steps: int) -> Classifier:
    """Over w and the bias; the features' own scaling stays."""
    optimizer = optax.lbfgs()
    of = lambda learnt: loss(start._replace(w_DxK=learnt[0], bias_K=learnt[1]))  # noqa: E731
    value_and_grad = optax.value_and_grad_from_state(of)

    @jax.jit
    def step(learnt, state):
        value, gradient = value_and_grad(learnt, state=state)
        updates, state = optimizer.update(gradient, state, learnt, value=value, grad=gradient, value_fn=of)
        return optax.apply_updates(learnt, updates), state

    learnt = (start.w_DxK, start.bias_K)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax's own arithmetic
        state = optimizer.init(learnt)
        for _ in range(steps):
            learnt, state = step(learnt, state)
    return start._replace(w_DxK=learnt[0], bias_K=learnt[1])
