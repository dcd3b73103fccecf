"""The same engine over a base that is spread over a mesh, rounded to int8, or of another family."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from popax.modeling.base import load_base, new_base, save_base
from popax.modeling.model import Model
from popax.serving.engine import Engine
from popax.serving.generate import generate
from popax.serving.programs import CompilationCounter, EngineShapes
from popax.serving.request import GenerationRequest
from popax.serving.rooms import rooms_of
from tests.modeling.conftest import CONFIGS
from tests.serving.world import COHORTS, World, ask, prompt_of, together

SHAPES = EngineShapes(rows=(4,), groups=2, width=8, context=64, contexts=(), page=8)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return World.make(tmp_path_factory.mktemp("bases") / "catalog", users=3, cohorts=(COHORTS[0], COHORTS[-1]))


def asked(world, engine, count=10):
    """Three users and the base at once, each against themselves alone."""
    users = [*world.users, None]
    requests = [
        GenerationRequest(
            tokens=tuple(prompt_of(at, 5 + 9 * at)), max_new_tokens=count, terms=world.terms(user) if user else ()
        )
        for at, user in enumerate(users)
    ]
    compiled = CompilationCounter()
    told = [listener.all().tokens for listener in together(engine, requests)]
    assert compiled.count == 0
    return told, [world.alone(list(request.tokens), count, user) for request, user in zip(requests, users, strict=True)]


def test_a_base_over_a_mesh(small):
    """Tensor parallel: weights, and with them the pages' heads, over two devices; adapters on both."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("tensor", "fsdp"))
    placed = jax.device_put(small.base.params, small.base.model.shardings(mesh))
    base = dataclasses.replace(small.base, params=placed)
    everywhere = NamedSharding(mesh, PartitionSpec())
    rooms = rooms_of(small.catalog, base.digest, slots=4, host_bytes=1 << 20, terms=1, sharding=everywhere)
    engine = Engine(base, small.tokenizer, rooms, shapes=SHAPES, mesh=mesh)
    engine.start()
    try:
        told, alone = asked(small, engine)
        assert told == alone
        assert engine.programs.page_sharding.spec[2] == "tensor"
    finally:
        engine.close()
        rooms.close()


@pytest.mark.slow
def test_an_int8_base(small, tmp_path):
    """Weights only: what `generate` says of the rounded base."""
    save_base(tmp_path / "base", small.base)
    rounded = load_base(tmp_path / "base", quantise="int8", keep_digest=True)
    world = dataclasses.replace(small, base=rounded)
    engine = world.engine(shapes=SHAPES, slots=4)
    try:
        told, alone = asked(world, engine)
        assert told == alone
        assert {leaf.dtype for leaf in jax.tree.leaves(rounded.params)} >= {np.dtype("int8")}
    finally:
        engine.close()
        engine.rooms.close()


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("deepseek", marks=pytest.mark.slow)])
def test_other_families_without_adapters(small, family):
    """Mixtures of experts, latent attention and its pages."""
    model = Model(CONFIGS[family])
    base = new_base(model, model.init(jax.random.key(2)), source="random weights")
    engine = Engine(base, small.tokenizer, shapes=SHAPES)
    engine.start()
    try:
        prompts = [np.random.default_rng(at).integers(0, 64, 4 + 7 * at).tolist() for at in range(3)]
        requests = [GenerationRequest(tokens=tuple(prompt), max_new_tokens=8) for prompt in prompts]
        told = [listener.all().tokens for listener in together(engine, requests)]
        alone = [generate(model, base.params, [prompt], max_new_tokens=8)[0].tokens.tolist() for prompt in prompts]
        assert told == alone
        assert ask(engine, prompts[0], max_new_tokens=8).tokens == alone[0]
    finally:
        engine.close()
