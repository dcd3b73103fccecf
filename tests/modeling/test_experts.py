"""Routed experts against "every expert for every token, masked", in float64: values, gradients, users, meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from popax.modeling import expert_parallel, experts
from popax.modeling.experts import Choice, ExpertWeights, Outputs, Values, experts_backward, experts_forward
from popax.modeling.routed import routed_experts
from popax.sharding import DEFAULT_RULES, ShardingRules

N, M, D, F, K, E = 4, 10, 8, 16, 3, 8
MESHES = {
    "expert": {"expert": 8},
    "population_expert": {"population": 2, "expert": 4},
    "fsdp_expert_tensor": {"fsdp": 2, "expert": 2, "tensor": 2},
    "population": {"population": 8},
    "fsdp_tensor": {"fsdp": 2, "tensor": 4},
}


def every_expert(x_MxD, expert_MxK, weight_MxK, weights):
    gate_MxExF = jnp.einsum("md,edf->mef", x_MxD, weights.gate_ExDxF)
    hidden_MxExF = jax.nn.silu(gate_MxExF) * jnp.einsum("md,edf->mef", x_MxD, weights.up_ExDxF)
    out_MxExD = jnp.einsum("mef,efd->med", hidden_MxExF, weights.down_ExFxD)
    chosen_MxKxE = jax.nn.one_hot(expert_MxK, weights.gate_ExDxF.shape[0], dtype=x_MxD.dtype)
    return jnp.einsum("med,mke,mk->md", out_MxExD, chosen_MxKxE, weight_MxK)


def routed(x_MxD, expert_MxK, weight_MxK, weights, *rules):
    return routed_experts(Values(x_MxD, weight_MxK), Choice(expert_MxK), weights, None, *rules).y_MxD


@pytest.fixture
def case():
    """(x, experts, weights of the sum) of N users, and the experts; experts 0 and E - 1 are nobody's."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        expert = np.stack([[1 + rng.permutation(E - 2)[:K] for _ in range(M)] for _ in range(N)])
        shapes = ((E, D, F), (E, D, F), (E, F, D))
        weights = ExpertWeights(*(jnp.asarray(rng.normal(size=shape)) for shape in shapes))
        x, weight = jnp.asarray(rng.normal(size=(N, M, D))), jnp.asarray(rng.random((N, M, K)))
        yield x, jnp.asarray(expert, jnp.int32), weight, weights


def close(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), found, wanted)


def loss(function, x, weight, weights, expert):
    return jnp.sum(jnp.sin(function(x, expert, weight, weights)))


def gradients(function):
    """What a frozen base asks for: each user's gradients of x and of the scores."""
    one = jax.value_and_grad(lambda *operands: loss(function, *operands), argnums=(0, 1))
    return jax.jit(jax.vmap(one, in_axes=(0, 0, None, 0)))


def trained_gradients(function):
    return jax.jit(jax.grad(lambda *operands: loss(function, *operands), argnums=(0, 1, 2)))


@pytest.mark.parametrize("chunk", [4096, 4])
@pytest.mark.parametrize("missing", [False, True])
def test_forward_and_backward_are_those_of_the_masked_sum(case, chunk, missing, monkeypatch):
    monkeypatch.setattr(experts, "CHUNK_TOKENS", chunk)
    x, expert, weight, weights = (leaf if isinstance(leaf, ExpertWeights) else leaf[0] for leaf in case)
    expert = jnp.where(expert == 2, E, expert) if missing else expert  # E: no expert of this device
    dy = jnp.cos(x)
    out, pull = jax.vjp(lambda *operands: every_expert(operands[0], expert, *operands[1:]), x, weight, weights)
    operands = (Values(x, weight), Choice(expert), weights)
    close(jax.jit(experts_forward)(*operands).y_MxD, out)
    for trained in (True, False):
        back = jax.jit(lambda *operands: experts_backward(*operands, trained=trained))  # noqa: B023
        dvalues, dweights, dfactors = back(*operands, None, Outputs(dy))
        close((dvalues.x_MxD, dvalues.weight_MxK, dweights), pull(dy) if trained else (*pull(dy)[:2], None))
        assert dfactors is None


def test_users_and_trained_experts_get_their_gradients(case):
    x, expert, weight, weights = case
    close(gradients(routed)(x, weight, weights, expert), gradients(every_expert)(x, weight, weights, expert))
    first = (x[0], weight[0], weights, expert[0])
    close(trained_gradients(routed)(*first), trained_gradients(every_expert)(*first))
    one = lambda function: jax.jit(jax.vmap(trained_gradients(function), in_axes=(0, 0, None, 0)))  # noqa: E731
    close(one(routed)(x, weight, weights, expert), one(every_expert)(x, weight, weights, expert))
    many = ExpertWeights(*(jnp.stack([leaf, 2 * leaf, leaf, leaf]) for leaf in weights))
    own = lambda function: jax.jit(jax.vmap(function))(x, expert, weight, many)  # noqa: E731
    close(own(routed), own(every_expert))


def test_users_are_folded_into_tokens_and_weights_stay_everybodys(case):
    x, expert, weight, weights = case
    text = gradients(routed).lower(x, weight, weights, expert).as_text()
    assert f"tensor<{N * M * K}x{D}xf64>" in text  # copies of all users' tokens, together
    for shape in (f"{D}x{F}", f"{F}x{D}"):
        assert f"tensor<{N}x{E}x{shape}xf64>" not in text
        assert f"tensor<{N}x{shape}xf64>" not in text
    # A frozen expert has no gradient: nothing of its shape comes out of an operation.
    made, trained = f"-> tensor<{E}x{D}x{F}xf64>", trained_gradients(routed)
    assert made not in text
    assert made in trained.lower(x[0], weight[0], weights, expert[0]).as_text()


def test_a_vmap_over_a_vmap_and_remat_change_nothing(case):
    x, expert, weight, weights = case
    want = gradients(every_expert)(x, weight, weights, expert)
    again = jax.checkpoint(routed)
    close(gradients(again)(x, weight, weights, expert), want)
    pairs = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), (x, weight, expert))
    nested = jax.jit(jax.vmap(gradients(routed), in_axes=(0, 0, None, 0)))
    found = nested(pairs[0], pairs[1], weights, pairs[2])
    close(jax.tree.map(lambda leaf: leaf.reshape(4, *leaf.shape[2:]), found), want)


@pytest.mark.parametrize("name", MESHES)
def test_experts_spread_over_a_mesh_are_the_same_function(case, name):
    x, expert, weight, weights = case
    wanted = gradients(every_expert)(x, weight, weights, expert)
    flat = (x.reshape(-1, D)[:37], weight.reshape(-1, K)[:37], weights, expert.reshape(-1, K)[:37])
    trained = trained_gradients(every_expert)(*flat)  # 37 tokens: no mesh divides them
    axes = MESHES[name]
    with jax.set_mesh(Mesh(np.array(jax.devices()).reshape(*axes.values()), tuple(axes))):
        close(gradients(routed)(x, weight, weights, expert), wanted)
        close(trained_gradients(routed)(*flat), trained)


def test_experts_lie_where_the_rules_put_them(case):
    """Over `tensor` instead of parts of one expert: tokens meet over it, and are nowhere else together."""
    x, expert, weight, weights = case
    moved = {"expert": "tensor", "expert_ffw": None, "embed": None}
    rules = ShardingRules(rules=tuple((dict(DEFAULT_RULES) | moved).items()))

    def along_tensor(*operands):
        return routed(*operands, rules)

    with jax.set_mesh(Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))):
        found = expert_parallel.spread(rules)
        assert (found.outer, found.expert, found.embed, found.ffw) == (("fsdp",), ("tensor",), (), ())
        close(gradients(along_tensor)(x, weight, weights, expert), gradients(every_expert)(x, weight, weights, expert))
