"""A population on a mixture of experts with latent attention: the invariants hold, on a mesh of experts as well."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from popax.adapters.apply import bind
from popax.adapters.base import ALL_LINEAR, AdapterConfig
from popax.adapters.cohort import Cohort
from popax.modeling.block_config import MLAConfig, MoEConfig
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.objectives.base import mean_of
from popax.objectives.sft import sft
from popax.population.optimizer import constant, sgd
from popax.population.state import hparams, init_population, population_shardings
from popax.population.step import member_step, population_step
from popax.sharding import ShardingRules
from popax.trees import member

CLOSE = {"rtol": 1e-6, "atol": 1e-6}
TARGETS = (ALL_LINEAR, r"layers\.moe\.(router|experts\..*)")
MODEL = Model(
    ModelConfig(
        **{"vocab_size": 32, "embed_dim": 16, "ffw_dim": 24, "num_layers": 3, "num_heads": 2, "num_kv_heads": 2},
        **{"head_dim": 12, "max_seq_len": 32},
        moe=MoEConfig(
            **{"num_experts": 8, "experts_per_token": 3, "expert_ffw_dim": 16, "shared_ffw_dim": 8},
            **{"first_dense_layers": 1, "scoring": "sigmoid", "num_groups": 4, "top_groups": 2, "routed_scaling": 2.5},
            correction_bias=True,
        ),
        mla=MLAConfig(q_latent_dim=8, kv_latent_dim=8, nope_head_dim=8, rope_head_dim=4, v_head_dim=8),
    )
)


@dataclasses.dataclass(frozen=True)
class Setup:
    params: dict
    cohort: Cohort
    state: object

    def programs(self, **options):
        # Adam turns the rounding of sums in another order into steps of the learning rate; plain descent does not.
        arguments = (self.cohort, sft(MODEL), sgd(), constant())
        return population_step(*arguments, **options), member_step(*arguments)


def everywhere() -> Cohort:
    return Cohort.of(AdapterConfig(rank=2, targets=TARGETS), MODEL.sites())


def make(users: int) -> Setup:
    cohort = everywhere()
    keys, own = jax.random.split(jax.random.key(1), users), hparams(learning_rate=0.1, max_steps=9)
    state = jax.jit(lambda keys: init_population(cohort, sgd(), keys, own))(keys)
    return Setup(MODEL.init(jax.random.key(7)), cohort, state)


def close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), left, right)


def test_adapters_reach_both_stacks_latents_experts_and_router():
    specs = everywhere().specs
    names = {name.partition(".")[2] for name in specs if name.startswith("layers.")}
    assert names >= {"attn.q_a_proj", "attn.kv_b_proj", "moe.shared.down_proj", "moe.router", "moe.experts.up_proj"}
    assert {"dense_layers.mlp.up_proj", "dense_layers.attn.kv_a_proj"} <= set(specs)
    default = Cohort.of(AdapterConfig(rank=2), MODEL.sites()).specs
    routed = {f"layers.moe.{name}" for name in ("router", *(f"experts.{w}_proj" for w in ("gate", "up", "down")))}
    off = {*routed, "lm_head", "layers.out", "dense_layers.out", "embed"}
    assert set(MODEL.sites()) - set(default) == off


@pytest.mark.slow
def test_invariants_1_and_9_a_member_alone_and_the_base_as_it_was(random_batch):
    setup = make(4)
    together, alone = map(jax.jit, setup.programs())
    state, single = setup.state, [member(setup.state, user) for user in range(4)]
    before = jax.tree.map(np.array, setup.params)
    for step in range(3):
        batch = random_batch(4, seed=step)
        state, _ = together(setup.params, {}, state, batch)
        single = [alone(setup.params, {}, one, member(batch, user))[0] for user, one in enumerate(single)]
    for user in range(4):
        close(member(state, user).adapters, single[user].adapters)
    jax.tree.map(np.testing.assert_array_equal, before, setup.params)
    moved = {
        name: np.abs(np.asarray(leaves["b"])).max() > 0
        for name, leaves in state.adapters.items()
        if name in setup.cohort.specs
    }
    assert all(moved.values()), moved


@pytest.mark.slow
def test_invariant_2_no_gradient_from_one_users_tokens_to_anothers_adapter(random_batch):
    setup, batch, objective = make(4), random_batch(4), sft(MODEL)

    def loss_of_user(adapters, user):
        one = lambda adapter, own: mean_of(objective)(setup.params, bind(setup.cohort, adapter, {}), own)[0]  # noqa: E731
        return jax.vmap(one)(adapters, batch)[user]

    gradient = jax.jit(jax.grad(loss_of_user))
    for user in range(4):
        for leaf in jax.tree.leaves(gradient(setup.state.adapters, user)):
            assert not np.delete(np.asarray(leaf), user, axis=0).any()


def on_mesh(setup: Setup, axes: dict[str, int], random_batch, users: int):
    """(compiled text, the state after one step) with users and experts spread over a mesh of these axes."""
    mesh = Mesh(np.array(jax.devices()).reshape(*axes.values()), tuple(axes))
    state = jax.device_put(setup.state, population_shardings(setup.cohort, setup.state, mesh, ShardingRules()))
    batch = jax.device_put(random_batch(users), NamedSharding(mesh, PartitionSpec("population")))
    params = jax.device_put(setup.params, MODEL.shardings(mesh))
    with jax.set_mesh(mesh):
        step = jax.jit(setup.programs(spmd_axis_name="population")[0])
        return step.lower(params, {}, state, batch).compile().as_text(), step(params, {}, state, batch)[0]


@pytest.mark.slow
def test_invariant_10_no_collective_crosses_the_population_axis(random_batch):
    setup = make(8)
    text, state = on_mesh(setup, {"population": 8}, random_batch, 8)
    for collective in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"):
        assert collective not in text, f"{collective} in the population step"
    close(state.adapters, jax.jit(setup.programs()[0])(setup.params, {}, setup.state, random_batch(8))[0].adapters)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"population": 2, "expert": 4}, {"population": 2, "expert": 2, "tensor": 2}], ids=str)
def test_experts_spread_beside_the_population_are_the_same_step(random_batch, axes):
    setup = make(8)
    text, state = on_mesh(setup, axes, random_batch, 8)
    assert "all-gather" in text
    close(state.adapters, jax.jit(setup.programs()[0])(setup.params, {}, setup.state, random_batch(8))[0].adapters)
    half = 4  # devices 0..3 hold one half of the users: no group of a collective holds devices of both
    for groups in collective_groups(text):
        assert all(len({device // half for device in group}) == 1 for group in groups), groups


def collective_groups(text: str) -> list[list[list[int]]]:
    """The device groups of every collective in a compiled program."""
    found = []
    for line in text.splitlines():
        if re.search(r"(all-reduce|all-gather|reduce-scatter|all-to-all)(-start)?\(", line):
            listed = re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", line)
            iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
            if listed:
                found.append([[int(d) for d in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])
            elif iota:
                shape, source, order = ([int(n) for n in part.split(",")] if part else None for part in iota.groups())
                devices = np.arange(np.prod(source)).reshape(source)
                devices = devices if order is None else devices.transpose(order)
                found.append(devices.reshape(shape).tolist())
    return found
