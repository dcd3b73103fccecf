"""Routes replayed in training: the gap to serving closes, and what has no record leaves the loss and is counted."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from popax.adapters.apply import bind
from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.data.rollouts import Rollout, pack_rollouts
from popax.errors import ConfigError
from popax.modeling.block_config import MoEConfig
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.objectives.base import mean_of
from popax.objectives.policy_gradient import policy_gradient
from popax.objectives.sft import sft
from popax.population.optimizer import constant, sgd
from popax.population.state import hparams, init_population, population_shardings
from popax.population.step import member_step, population_step
from popax.serving.generate import generate
from popax.serving.sampling import Sampling
from popax.sharding import ShardingRules
from popax.trees import member
from popax.types import NO_ADAPT, NOT_RECORDED

SHAPE = {"vocab_size": 48, "embed_dim": 32, "ffw_dim": 40, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2}
SHAPE |= {"head_dim": 8, "max_seq_len": 128, "qk_norm": True}
SIGMOID = {"scoring": "sigmoid", "correction_bias": True, "num_groups": 4, "top_groups": 2, "routed_scaling": 2.5}
MIXTURES = {
    "softmax": MoEConfig(num_experts=64, experts_per_token=4, expert_ffw_dim=16),
    "sigmoid": MoEConfig(
        **{"num_experts": 16, "experts_per_token": 2, "expert_ffw_dim": 16, "shared_ffw_dim": 16},
        **{"first_dense_layers": 1} | SIGMOID,
    ),
}
MODELS = {name: Model(ModelConfig(**SHAPE, moe=moe)) for name, moe in MIXTURES.items()}
PROMPTS = [[i + 1, i + 2, i + 3] for i in range(8)]


def noisy_router(model: Model, params):
    """Serving weights whose router logits are off by about 0.1%, as those of another kernel or precision are."""
    router = model.site_weight(params, "layers.moe.router")
    noise = 1 + 1e-3 * jax.random.normal(jax.random.key(9), router.shape)
    return model.with_site_weight(params, "layers.moe.router", router * noise)


def write(model: Model, params, new: int, prompts=PROMPTS) -> list:
    rule = {"sampling": Sampling(temperature=1.0), "record_routes": True}
    return [row.record for row in generate(model, params, prompts, max_new_tokens=new, **rule)]


def differences(model: Model, params, records) -> tuple[list[float], list[float]]:
    """[mean, largest] |log p in training - in serving| with the record's routes, and without."""
    rollouts = pack_rollouts(model, [record.rollout(1.0) for record in records], 128)
    found = []
    for replay in (True, False):
        _, sums = jax.jit(mean_of(policy_gradient(model, replay=replay)))(params, NO_ADAPT, rollouts)
        assert (float(sums.targets), float(sums.unmapped)) == (8 * 96, 0)
        found.append([float(sums.difference / sums.targets), float(sums.largest_difference)])
    return found[0], found[1]


@pytest.mark.parametrize("name", MODELS)
def test_replay_leaves_less_than_a_tenth_of_the_difference_to_serving(name):
    model = MODELS[name]
    params = model.init(jax.random.key(0))
    (mean, largest), (mean_without, largest_without) = differences(
        model, params, write(model, noisy_router(model, params), 96)
    )
    assert 0 < mean < mean_without / 10
    assert 0 < largest < largest_without / 10
    assert largest_without > 0.05, "no token went elsewhere: there was nothing to replay"


def test_with_serving_in_bfloat16_the_largest_difference_falls_below_a_tenth():
    """All of serving is rounded, not its routers alone: what is left of the mean is the rounding of everything else."""
    model = MODELS["softmax"]
    params = model.init(jax.random.key(0))
    serving = Model(dataclasses.replace(model.config, dtype="bfloat16"))
    (mean, largest), (mean_without, largest_without) = differences(model, params, write(serving, params, 96))
    assert largest < largest_without / 10
    assert mean < mean_without / 2


SMALL = Model(
    ModelConfig(
        **SHAPE | {"num_layers": 2, "embed_dim": 16, "num_heads": 2, "num_kv_heads": 1},
        moe=MoEConfig(num_experts=8, experts_per_token=2, expert_ffw_dim=8, shared_ffw_dim=8),
    )
)


@dataclasses.dataclass(frozen=True)
class World:
    params: dict
    cohort: Cohort
    records: list

    def adapter(self, seed: int):
        key = jax.random.key(seed)
        return jax.tree.map(lambda leaf: 0.2 * jax.random.normal(key, leaf.shape), self.cohort.init(key))


@pytest.fixture(scope="module")
def world() -> World:
    params = SMALL.init(jax.random.key(0))
    cohort = Cohort.of(AdapterConfig(rank=2, targets=(r"layers\.attn\.o_proj", r"layers\.moe\.router")), SMALL.sites())
    return World(params, cohort, write(SMALL, params, 8, PROMPTS[:6]))


def gradient(world: World, objective, adapter, *batches):
    """((loss, sums), gradient) for each batch, compiled once."""
    call = lambda adapter, batch: mean_of(objective)(world.params, bind(world.cohort, adapter, {}), batch)  # noqa: E731
    compiled = jax.jit(jax.value_and_grad(call, has_aux=True))
    return [compiled(adapter, batch) for batch in batches]


def close(left, right, **options):
    options = {"rtol": 1e-5, "atol": 1e-6} | options
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **options), left, right)


def test_the_routers_own_routes_and_advantage_one_are_supervised_fine_tuning(world):
    adapter = world.adapter(1)
    texts = [(record.tokens_T, record.prompt_length) for record in world.records]
    plain = pack_rollouts(SMALL, [Rollout(*text, 1.0, None) for text in texts], 24)
    forward = jax.jit(
        lambda batch: SMALL.forward(
            world.params,
            batch.tokens_BxT,
            positions_BxT=batch.positions_BxT,
            segments_BxT=batch.segments_BxT,
            adapt=bind(world.cohort, adapter, {}),
            record_routes=True,
        )[2]
    )
    own = plain._replace(routes_BxTxLxK=forward(plain.batch), serve_logps_BxT=np.zeros_like(plain.serve_logps_BxT))
    (((loss, sums), grads),) = gradient(world, policy_gradient(SMALL, importance=False, remat="full"), adapter, own)
    (((sft_loss, sft_sums), sft_grads),) = gradient(world, sft(SMALL), adapter, plain.batch)
    close((loss, sums.nll, sums.targets, grads), (sft_loss, sft_sums.nll, sft_sums.targets, sft_grads))
    assert np.abs(grads["layers.moe.router"]["b"]).max() > 0, "the routers' scores have no gradient"


def test_targets_without_a_record_leave_the_loss_and_are_counted(world):
    adapter, objective = world.adapter(1), policy_gradient(SMALL)
    kept = [record.rollout(advantage) for record, advantage in zip(world.records, [1, -2, 3, 1, -1, 2], strict=True)]
    lost = kept[1]._replace(record=None)
    both = pack_rollouts(SMALL, [kept[0], lost, *kept[2:]], 12, rows=6)
    without = pack_rollouts(SMALL, [kept[0], *kept[2:]], 12, rows=6)
    hole = np.array(without.routes_BxTxLxK)
    hole[0, 5, 1, 0] = NOT_RECORDED
    hole = without._replace(routes_BxTxLxK=hole)
    none = pack_rollouts(SMALL, [rollout._replace(record=None) for rollout in kept], 12, rows=6)
    found = gradient(world, objective, adapter, both, without, hole, none)
    ((loss, sums), grads), ((wanted, wanted_sums), wanted_grads) = found[:2]
    assert (float(sums.unmapped), float(wanted_sums.unmapped)) == (8, 0)
    close((loss, grads, sums._replace(unmapped=wanted_sums.unmapped)), (wanted, wanted_grads, wanted_sums))
    # A hole in one record takes one target with it, and a batch without any record moves nothing.
    (_, sums), _ = found[2]
    assert (float(sums.unmapped), float(sums.targets)) == (1, 39)
    (loss, sums), grads = found[3]
    assert (float(loss), float(sums.unmapped), float(sums.targets)) == (0.0, 48, 0)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_weights_are_the_ratio_to_serving_cut_off_above(world):
    """In closed form, from each target's log-probabilities."""
    adapter = world.adapter(1)
    rollouts = pack_rollouts(SMALL, [record.rollout(2.0) for record in world.records], 24)
    nats_of = jax.jit(
        lambda batch, routes: (
            -jax.nn.log_softmax(
                SMALL(
                    world.params,
                    batch.tokens_BxT,
                    positions_BxT=batch.positions_BxT,
                    segments_BxT=batch.segments_BxT,
                    adapt=bind(world.cohort, adapter, {}),
                    routes_BxTxLxK=routes,
                )
            )
        )
    )
    nats_BxTxV = np.asarray(nats_of(rollouts.batch, rollouts.routes_BxTxLxK), np.float64)
    nll_BxT = np.take_along_axis(nats_BxTxV, np.asarray(rollouts.batch.targets_BxT)[..., None], axis=-1)[..., 0]
    sampled = np.asarray(rollouts.batch.weights_BxT) > 0
    nats, ratio = nll_BxT[sampled], np.exp(-nll_BxT[sampled] - np.asarray(rollouts.serve_logps_BxT)[sampled])
    assert ratio.min() < 0.9 < 1.1 < ratio.max()
    for cap in (math.inf, 1.1):
        objective = jax.jit(mean_of(policy_gradient(SMALL, max_ratio=cap)))
        loss, sums = objective(world.params, bind(world.cohort, adapter, {}), rollouts)
        assert float(loss) == pytest.approx(float(np.mean(2.0 * np.minimum(ratio, cap) * nats)), rel=1e-4)
        assert float(sums.difference) == pytest.approx(float(np.abs(np.log(ratio)).sum()), rel=1e-3)
        assert float(sums.largest_difference) == pytest.approx(float(np.abs(np.log(ratio)).max()), rel=1e-3)


def test_invariant_1_a_member_with_rollouts_is_the_member_alone(world):
    arguments = (world.cohort, policy_gradient(SMALL), sgd(), constant())
    keys, own = jax.random.split(jax.random.key(1), 3), hparams(learning_rate=0.5, max_steps=9)
    state = init_population(world.cohort, sgd(), keys, own)
    each = [pack_rollouts(SMALL, [r.rollout(1.0) for r in world.records[at : at + 2]], 24, rows=1) for at in (0, 2, 4)]
    together, metrics = jax.jit(population_step(*arguments))(
        world.params, {}, state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    )
    alone = jax.jit(member_step(*arguments))
    for user in range(3):
        single, one = alone(world.params, {}, member(state, user), each[user])
        close(member(together, user).adapters, single.adapters, rtol=1e-6)
        assert float(one.sums.targets) == float(metrics.sums.targets[user]) == 16
    moved = [
        np.abs(leaf).max() > 0 for leaf in (together.adapters["layers.moe.router"]["b"][user] for user in range(3))
    ]
    assert all(moved)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"population": 8}, {"population": 2, "expert": 4}], ids=str)
def test_invariant_10_replay_on_a_mesh_is_the_same_step(world, axes):
    arguments = (world.cohort, policy_gradient(SMALL), sgd(), constant())
    keys, own = jax.random.split(jax.random.key(1), 8), hparams(learning_rate=0.5, max_steps=9)
    state = init_population(world.cohort, sgd(), keys, own)
    rollouts = pack_rollouts(SMALL, [record.rollout(1.0) for record in world.records[:2]], 24, rows=1)
    rollouts = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), rollouts)
    wanted, _ = jax.jit(population_step(*arguments))(world.params, {}, state, rollouts)
    mesh = Mesh(np.array(jax.devices()).reshape(*axes.values()), tuple(axes))
    spread = (
        jax.device_put(world.params, SMALL.shardings(mesh)),
        {},
        jax.device_put(state, population_shardings(world.cohort, state, mesh, ShardingRules())),
        jax.device_put(rollouts, NamedSharding(mesh, PartitionSpec("population"))),
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(population_step(*arguments, spmd_axis_name="population")).lower(*spread).compile()
        found, _ = compiled(*spread)
    close(found.adapters, wanted.adapters)
    if axes == {"population": 8}:
        for collective in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"):
            assert collective not in compiled.as_text(), collective


@pytest.mark.parametrize("max_ratio", [0.0, float("nan")])
def test_a_ratio_that_lets_nothing_through_is_refused(max_ratio):
    with pytest.raises(ConfigError, match="max_ratio"):
        policy_gradient(SMALL, max_ratio=max_ratio)
