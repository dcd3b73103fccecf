"""Rows cut along their tokens over eight devices: one device's step and cache, a device's part of the work."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.errors import ConfigError
from popax.modeling.block_config import MLAConfig, MoEConfig
from popax.modeling.cache import init_cache
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.objectives.sft import sft
from popax.plan.costs import count
from popax.plan.hlo import parse
from popax.population.optimizer import constant, sgd
from popax.population.state import hparams, init_population, population_shardings
from popax.population.step import population_step
from popax.types import Batch

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
DENSE = ModelConfig(
    **{"vocab_size": 256, "embed_dim": 32, "ffw_dim": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1},
    **{"head_dim": 16, "max_seq_len": 64},
)
MIXTURE = dataclasses.replace(
    DENSE,
    num_kv_heads=2,
    moe=MoEConfig(num_experts=4, experts_per_token=2, expert_ffw_dim=16, shared_ffw_dim=16),
    mla=MLAConfig(q_latent_dim=8, kv_latent_dim=8, nope_head_dim=8, rope_head_dim=8, v_head_dim=16),
)
USERS, TOKENS = 4, 32


def mesh_of(**axes: int) -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(*axes.values()), tuple(axes))


def step_of(config: ModelConfig, mesh: Mesh | None):
    """(the new state, the compiled program) of a population's step."""
    model = Model(config)
    cohort = Cohort.of(AdapterConfig(rank=2), model.sites())
    settings = hparams(learning_rate=0.1, max_steps=9)
    state = init_population(cohort, sgd(), jax.random.split(jax.random.key(1), USERS), settings)
    state = state._replace(adapters=jax.tree.map(lambda leaf: leaf + 0.02, state.adapters))
    draws = np.random.default_rng(0).integers(0, config.vocab_size, (2, USERS, 1, TOKENS), np.int32)
    positions = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), draws.shape[1:])
    segments = 1 + (positions >= 20).astype(np.int32)
    ones = np.ones(draws.shape[1:], np.int32)
    batch = Batch(*draws, ones.astype(np.float32), np.where(positions < 20, positions, positions - 20), segments, ones)
    params = model.init(jax.random.key(0))
    spread = None
    if mesh is not None:
        spread = "population"
        params = jax.device_put(params, model.shardings(mesh))
        state = jax.device_put(state, population_shardings(cohort, state, mesh, model.rules))
    step = jax.jit(population_step(cohort, sft(model), sgd(), constant(), spmd_axis_name=spread))
    with jax.set_mesh(mesh) if mesh is not None else jax.default_device(None):
        program = step.lower(params, {}, state, batch).compile()
        return program(params, {}, state, batch), program


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "axes"),
    [(DENSE, {"population": 2, "context": 4}), (MIXTURE, {"population": 2, "expert": 2, "context": 2})],
    ids=["dense", "mixture"],
)
def test_a_step_is_one_devices_step(config, axes):
    (alone, metrics), whole = step_of(config, None)
    (cut, cut_metrics), part = step_of(config, mesh_of(**axes))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), metrics, cut_metrics)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), alone, cut)
    if config is DENSE:
        # Every product is cut: projections, adapters, attention and head.
        one, eighth = (count(parse(program.as_text())).matmul_flops for program in (whole, part))
        assert one == 8 * eighth


@pytest.mark.parametrize("config", [DENSE, dataclasses.replace(MIXTURE, moe=None)], ids=["grouped", "latent"])
def test_a_long_prefill_fills_the_cache_of_one_device(config):
    model = Model(config)
    params, tokens = model.init(jax.random.key(0)), jnp.arange(2 * TOKENS, dtype=jnp.int32).reshape(2, TOKENS)

    @jax.jit
    def prefill(params, tokens):
        x, cache = model.hidden(params, tokens, cache=init_cache(config, 2, 2 * TOKENS))
        return x[:, -1], cache

    alone = prefill(params, tokens)
    with jax.set_mesh(mesh_of(context=8)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), alone, prefill(params, tokens))


def test_rows_that_do_not_divide_are_refused():
    model = Model(DENSE)
    with (
        jax.set_mesh(mesh_of(context=8)),
        pytest.raises(ConfigError, match=r"rows of 12 tokens do not divide over .* 8"),
    ):
        jax.eval_shape(model, model.abstract(), jax.ShapeDtypeStruct((1, 12), jnp.int32))
