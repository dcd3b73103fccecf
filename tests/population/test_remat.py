"""Policies of rematerialisation: the step is the same, and keeps as much memory as its name says."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.errors import ConfigError
from popax.modeling.block_config import MLAConfig, MoEConfig
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.objectives.sft import sft
from popax.population.step import population_loss
from popax.training.config import TrainConfig

DENSE = ModelConfig(
    **{"vocab_size": 32, "embed_dim": 32, "ffw_dim": 96, "num_layers": 4, "num_heads": 2, "num_kv_heads": 2},
    **{"head_dim": 16, "max_seq_len": 64},
)
MIXTURE = dataclasses.replace(
    DENSE,
    moe=MoEConfig(num_experts=4, experts_per_token=2, expert_ffw_dim=16, shared_ffw_dim=16, first_dense_layers=1),
    mla=MLAConfig(q_latent_dim=8, kv_latent_dim=8, nope_head_dim=8, rope_head_dim=8, v_head_dim=16),
)
USERS, TOKENS = 2, 64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "policies"),
    [(DENSE, ("none", "projections", "attention", "full")), (MIXTURE, ("none", "projections"))],
    ids=["dense", "mixture"],
)
def test_same_loss_and_gradients_and_less_memory(config, policies, random_batch):
    """By the compiler's count, of the gradients of a population's loss with respect to adapters that are not zero."""
    model = Model(config)
    cohort = Cohort.of(AdapterConfig(rank=2), model.sites())
    shapes = jax.eval_shape(lambda: jax.vmap(cohort.init)(jax.random.split(jax.random.key(0), USERS)))
    draws = np.random.default_rng(0)
    adapters = jax.tree.map(lambda leaf: np.float32(0.05 * draws.standard_normal(leaf.shape)), shapes)
    operands = (adapters, model.init(jax.random.key(0)), random_batch(USERS, rows=1, tokens=TOKENS))

    def compiled(remat):
        loss = population_loss(cohort, sft(model, remat=remat))

        def total(adapters, params, batch):
            sums = loss(params, {}, adapters, batch)
            return jnp.sum(sums.nll / sums.targets)

        return jax.jit(jax.value_and_grad(total)).lower(*operands).compile()

    programs = {remat: compiled(remat) for remat in policies}
    plain = programs["none"](*operands)
    for program in programs.values():
        again = program(*operands)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), plain, again)
    held = [program.memory_analysis().temp_size_in_bytes for program in programs.values()]
    assert all(more > less for more, less in itertools.pairwise(held))


@pytest.mark.parametrize("remat", [True, "dots", None])
def test_other_names_are_refused(remat):
    with pytest.raises(ConfigError, match=r"TrainConfig.remat=.*'projections'.*'full'"):
        TrainConfig(remat=remat)
