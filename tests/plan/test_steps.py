"""The steps of a plan on eight devices of this host: they compile, keep their places, and users stay apart."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.modeling.block_config import MoEConfig
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.plan.collectives import collectives, crossing
from popax.plan.config import STEPS, MeshShape, PlanConfig
from popax.plan.hlo import parse
from popax.plan.steps import StepBuilder

MODEL = ModelConfig(vocab_size=64, embed_dim=16, ffw_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
# Eight devices; the slice's kind does not matter here.
CONFIG = PlanConfig(
    topology="v5e:2x4",
    mesh=MeshShape(population=2, fsdp=2, tensor=2),
    users=8,
    rows=2,
    tokens=16,
    adapter=AdapterConfig(rank=2, targets=(r"layers\..*_proj", "lm_head")),
    slots=4,
    decode_rows=4,
    prefill_rows=4,
    prefill_tokens=16,
    cache_length=32,
)


def build(config, name, model=MODEL):
    sizes = config.mesh.sizes
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(tuple(sizes.values())), tuple(sizes))
    built = StepBuilder.of(config, model, mesh).build(name)
    with jax.set_mesh(mesh):
        jitted = jax.jit(built.call, donate_argnums=built.donated, out_shardings=built.results)
        return name, built, jitted.lower(*built.operands.values()).compile()


@pytest.fixture(scope="module", params=STEPS)
def step(request):
    return build(CONFIG, request.param)


def test_users_lie_over_population_and_fsdp_and_weights_over_fsdp_and_tensor(step):
    name, built, _ = step
    spread = ("population", "fsdp", "expert") if name == "train" else "population"
    lead = 0 if name == "train" else 1
    q_proj = built.operands["adapters"]["layers.attn.q_proj"]
    assert q_proj["a"].sharding.spec[lead] == spread
    assert q_proj["b"].sharding.spec[-1] == "tensor"
    assert built.operands["base"]["layers"]["attn"]["q_proj"]["kernel"].sharding.spec[-1] == "tensor"


def test_what_the_next_call_takes_lies_as_it_did(step):
    name, built, compiled = step
    state, rest = compiled.output_shardings if name == "train" else compiled.output_shardings[::-1]
    given = built.operands["adapters"] if name == "train" else built.operands["cache"]
    kept = state.adapters if name == "train" else state
    assert rest is not None
    assert jax.tree.map(lambda leaf: leaf.sharding, given) == kept


@pytest.mark.parametrize("name", STEPS)
def test_nothing_but_metrics_crosses_the_population(name):
    """Without `tensor`, beside which this host's partitioner, unlike a TPU's, rearranges the token ids of all users."""
    config = dataclasses.replace(CONFIG, mesh=MeshShape(population=2, fsdp=4))
    _, _, compiled = build(config, name)
    found = collectives(parse(compiled.as_text()), config.mesh.sizes)
    assert any(one.axes == ("fsdp",) for one in found)
    assert crossing(found, "population", CONFIG.users) == []


def test_adapters_of_routed_experts_lie_with_the_experts_and_their_users():
    """Users are spread over the experts' devices too, but what they have at experts lies where those do."""
    model = dataclasses.replace(MODEL, moe=MoEConfig(num_experts=4, experts_per_token=2, expert_ffw_dim=16))
    adapter = AdapterConfig(rank=2, targets=(r"layers\.moe\.experts\..*",))
    config = dataclasses.replace(CONFIG, mesh=MeshShape(population=2, fsdp=2, expert=2), adapter=adapter)
    _, built, compiled = build(config, "train", model)
    adapters, sizes = built.operands["adapters"], config.mesh.sizes
    b = adapters["layers.moe.experts.up_proj"]["b"]
    assert b.sharding.spec == PartitionSpec(("population", "fsdp"), None, "expert", None, "tensor")
    held = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(adapters))
    assert held == config.users * Cohort.of(adapter, Model(model).sites()).num_params // 8
    found = crossing(collectives(parse(compiled.as_text()), sizes), "population", config.users)
    # This host's partitioner makes the lookup of embeddings everybody's on such a mesh, whatever is adapted.
    assert [one.op_name for one in found if not one.op_name.endswith("vmap(jvp())/gather")] == []
