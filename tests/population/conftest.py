"""A tiny model with random weights, and a population of users with random text on it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.base import AdapterConfig, TargetRule
from popax.adapters.cohort import Cohort
from popax.adapters.table import METHODS
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.types import Batch

USERS = 4
# Three of the seven maps, all of other widths: a step treats a site like any other, and tracing takes its time by site.
SOME_SITES = r"layers\..*(q_proj|v_proj|down_proj)"
# Rank 3 in layer 0 and 2 elsewhere: padded columns exist in every test.
OTHER_RANK = TargetRule(pattern=r"layers\.0\..*q_proj", rank=3)
EVERY_SITE = (OTHER_RANK, TargetRule(pattern=r"layers\..*_proj"))


@dataclasses.dataclass(frozen=True)
class Bench:
    """A model and its weights."""

    model: Model
    params: dict

    def cohort(self, method: str, **changes) -> Cohort:
        targets = {
            "linear": (OTHER_RANK, TargetRule(pattern=SOME_SITES)),
            "hidden": (TargetRule(pattern=r"layers\.0\.out", rank=3), TargetRule(pattern=r"layers\.out")),
            "embedding": (TargetRule(pattern="embed"),),
        }[METHODS[method].kind]
        config = AdapterConfig(method=method, **{"rank": 2, "targets": targets, **changes})
        return Cohort.of(config, self.model.sites())

    def shared(self, cohort: Cohort):
        return jax.jit(lambda params: cohort.shared(*self.model.site_arrays(params)))(self.params)


@pytest.fixture(scope="session")
def bench() -> Bench:
    model = Model(
        ModelConfig(
            vocab_size=32,
            embed_dim=16,
            ffw_dim=24,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            max_seq_len=32,
        )
    )
    return Bench(model, model.init(jax.random.key(7)))


def make_batch(users: int, rows: int = 2, tokens: int = 12, seed: int = 0) -> Batch:
    """Packed rows: two segments, padding at the end, some targets without loss."""
    rng = np.random.default_rng(seed)
    shape = (users, rows, tokens)
    position = np.arange(tokens)
    segments = np.broadcast_to(np.where(position < 5, 1, np.where(position < 10, 2, 0)), shape)
    return Batch(
        tokens_BxT=jnp.asarray(rng.integers(0, 32, shape), jnp.int32),
        targets_BxT=jnp.asarray(rng.integers(0, 32, shape), jnp.int32),
        weights_BxT=jnp.asarray((rng.random(shape) < 0.8) * (segments > 0), jnp.float32),
        positions_BxT=jnp.asarray(np.broadcast_to(np.where(position < 5, position, position - 5), shape), jnp.int32),
        segments_BxT=jnp.asarray(segments, jnp.int32),
        target_bytes_BxT=jnp.ones(shape, jnp.int32),
    )


@pytest.fixture(scope="session")
def random_batch():
    return make_batch
