"""A population on a quantised base: the step is that on the dequantised one, a member is alone, the base stays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.errors import ConfigError
from popax.modeling.model import Model
from popax.modeling.quantised import dense, stored_weight
from popax.objectives.sft import sft
from popax.population.optimizer import constant, sgd
from popax.population.state import hparams, init_population
from popax.population.step import population_step
from popax.training.pretrain import PretrainConfig, pretrain
from popax.trees import flatten_named, unflatten_named


@pytest.fixture(scope="module")
def model(bench) -> Model:
    return Model(dataclasses.replace(bench.model.config, quantise="int8"))


def test_invariants_1_and_9_and_the_step_of_the_dequantised_base(bench, model, random_batch):
    cohort, batch, own = bench.cohort("lora"), random_batch(3), hparams(learning_rate=0.1, max_steps=9)
    start = init_population(cohort, sgd(), jax.random.split(jax.random.key(1), 3), own)
    # A fresh adapter's second factor is zero, and with it the gradient of the first.
    start = start._replace(adapters=jax.tree.map(lambda leaf: leaf + 0.1, start.adapters))
    params = model.init(jax.random.key(7))
    flat, before = flatten_named(params), jax.tree.map(np.array, params)
    whole = {
        name: dense(stored_weight(flat, name), jnp.float32) if name.endswith("/kernel") else flat[name]
        for name in flatten_named(bench.model.abstract())
    }

    def after(model, params, users: slice = slice(None)):
        step = jax.jit(population_step(cohort, sft(model), sgd(), constant()))
        state, batches = (jax.tree.map(lambda leaf: leaf[users], tree) for tree in (start, batch))
        return step(params, {}, state, batches)[0].adapters

    together = after(model, params)
    moved = jax.tree.map(lambda now, then: float(jnp.abs(now - then).max()), together, start.adapters)
    assert min(jax.tree.leaves(moved)) > 1e-4
    close(together, after(bench.model, unflatten_named(whole)), 1e-5)
    close(jax.tree.map(lambda leaf: leaf[1:2], together), after(model, params, slice(1, 2)), 1e-6)
    jax.tree.map(np.testing.assert_array_equal, before, params)


def close(left, right, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), left, right)


def test_a_quantised_base_is_not_trained(model):
    with pytest.raises(ConfigError, match="frozen"):
        pretrain(model, lambda step: None, PretrainConfig())
