"""Distillation: the divergence is the one that probabilities give, and pulls the student to the teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from popax.adapters.apply import bind
from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.errors import ConfigError
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.objectives.base import mean_of
from popax.objectives.distill import DistillBatch, distill, pair
from popax.types import Batch

SHAPE = {"vocab_size": 40, "ffw_dim": 24, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "max_seq_len": 32}
OLD = Model(ModelConfig(**SHAPE, embed_dim=16, num_layers=2))
NEW = Model(ModelConfig(**SHAPE, embed_dim=24, num_layers=3))
CONFIG = AdapterConfig(rank=2, init="gaussian")


def loud(cohort, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(leaf.dtype), cohort.abstract())


@pytest.fixture(scope="module")
def setup():
    """(both cohorts, params, student's adapter, examples): two packed rows of which a part carries loss."""
    cohorts = [Cohort.of(CONFIG, model.sites()) for model in (OLD, NEW)]
    params = pair(NEW.init(jax.random.key(1)), OLD.init(jax.random.key(0)), {})
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40, (2, 12)).astype(np.int32)
    segments = np.array([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3], np.int32)
    positions = np.array([[*range(5), *range(7)], [*range(9), 0, 0, 0]], np.int32)
    weights = ((segments > 0) & (rng.random((2, 12)) < 0.7)).astype(np.float32)
    batch = Batch(
        *map(jnp.asarray, (tokens, np.roll(tokens, -1, 1), weights, positions, segments, np.full((2, 12), 3, np.int32)))
    )
    return cohorts, params, loud(cohorts[1], 2), DistillBatch(batch, loud(cohorts[0], 3))


def test_the_loss_is_the_mean_divergence_of_whole_distributions(setup):
    """Against scipy's relative entropy of softmaxed logits, both models called as they are."""
    (old, new), params, adapter, examples = setup
    batch = examples.batch
    options = {"positions_BxT": batch.positions_BxT, "segments_BxT": batch.segments_BxT}
    teacher = OLD(params["teacher"], batch.tokens_BxT, adapt=bind(old, examples.teacher, {}), **options)
    student = NEW(params["student"], batch.tokens_BxT, adapt=bind(new, adapter, {}), **options)
    p, q = (softmax(np.asarray(logits, np.float64), axis=-1) for logits in (teacher, student))
    weights = np.asarray(batch.weights_BxT)
    expected = (rel_entr(p, q).sum(-1) * weights).sum()
    for chunk in (128, 5, 1):
        loss, sums = mean_of(distill(NEW, OLD, old, chunk=chunk))(params, bind(new, adapter, {}), examples)
        np.testing.assert_allclose(float(sums.nll), expected, rtol=1e-4)
        np.testing.assert_allclose(float(loss), expected / weights.sum(), rtol=1e-4)
        assert (float(sums.targets), float(sums.target_bytes)) == (weights.sum(), 3 * weights.sum())


def test_a_student_who_is_the_teacher_has_nothing_to_learn(setup):
    (old, _), params, _, examples = setup
    same = pair(params["teacher"], params["teacher"], {})

    def loss(adapter):
        return mean_of(distill(OLD, OLD, old))(same, bind(old, adapter, {}), examples)[0]

    value, grads = jax.value_and_grad(loss)(examples.teacher)
    assert abs(float(value)) < 1e-5
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) < 1e-5
    # Another adapter of the teacher is another examples.
    assert float(jax.value_and_grad(loss)(loud(old, 9))[0]) > 1e-3


def test_the_gradient_is_the_same_in_chunks_and_goes_to_the_student_alone(setup):
    (old, new), params, adapter, examples = setup

    def loss(adapter, teacher, chunk):
        objective = mean_of(distill(NEW, OLD, old, chunk=chunk))
        return objective(params, bind(new, adapter, {}), examples._replace(teacher=teacher))[0]

    whole = jax.grad(loss, argnums=(0, 1))(adapter, examples.teacher, 128)
    parts = jax.grad(loss, argnums=(0, 1))(adapter, examples.teacher, 5)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), whole, parts)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole[0])) > 1e-3
    assert not any(leaf.any() for leaf in jax.tree.leaves(whole[1]))


def test_other_tokens_cannot_be_compared(setup):
    (old, _), *_ = setup
    other = Model(dataclasses.replace(NEW.config, vocab_size=41))
    with pytest.raises(ConfigError, match="40 tokens and the student 41"):
        distill(other, OLD, old)
