"""A tiny decoder with an untied head, and loud adapters of every method on every site of it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.adapters.table import METHODS
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.types import AdapterState, Params
from tests.serving.world import World

MODEL = Model(
    ModelConfig(
        vocab_size=61, embed_dim=16, ffw_dim=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, max_seq_len=64
    )
)


class Users(NamedTuple):
    """One method's cohort on the tiny model, with a few users' adapters."""

    cohort: Cohort
    shared: AdapterState
    adapters: list[AdapterState]


@pytest.fixture(scope="session")
def model() -> Model:
    return MODEL


@pytest.fixture(scope="session")
def params(model) -> Params:
    return model.init(jax.random.key(0))


@pytest.fixture(scope="session")
def users_of(model, params):
    @functools.cache
    def make(method: str, count: int = 3, seed: int = 0) -> Users:
        targets = {"linear": (r"layers\..*_proj", "lm_head"), "hidden": (r"layers\.out",), "embedding": ("embed",)}[
            METHODS[method].kind
        ]
        cohort = Cohort.of(AdapterConfig(method=method, rank=3, alpha=3.0, targets=targets), model.sites())
        shared = cohort.shared(*model.site_arrays(params))
        rng = np.random.default_rng(seed)

        def loud(leaf):
            return jnp.asarray(rng.normal(size=leaf.shape, scale=0.5), leaf.dtype)

        return Users(cohort, shared, [jax.tree.map(loud, cohort.abstract()) for _ in range(count)])

    return make


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    return World.make(tmp_path_factory.mktemp("world") / "catalog")


@pytest.fixture(scope="session")
def engine(world):
    """All users fit; who needs it tight makes another one."""
    engine = world.engine()
    yield engine
    engine.close()
    engine.rooms.close()
