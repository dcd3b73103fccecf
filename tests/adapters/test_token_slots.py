"""A slot for each token: parts of one text have adapters of their own, in the forward pass and in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.apply import bind, bind_slots
from popax.adapters.table import METHODS
from popax.errors import ConfigError
from popax.types import NO_ADAPT

BY_TOKEN = [name for name, method in METHODS.items() if method.kind != "embedding" and not method.memory]
SLOTS = jnp.asarray([[0, 0, 1, -1, 1], [-1, 1, 1, 0, 0]])


def pooled(cohort, adapters):
    return {
        name: jax.tree.map(lambda *leaves, axis=int(layered): jnp.stack(leaves, axis), *(one[name] for one in adapters))
        for name, layered in cohort.layered.items()
    }


@pytest.mark.parametrize("method", BY_TOKEN)
def test_every_token_is_as_in_a_row_of_its_own_adapter(toy, method):
    """Tokens of the toy do not meet, so that each is what it is where a whole row has its slot: invariants 4 and 5."""
    cohort = toy.cohort(row=method)
    shared, users, x = toy.shared(cohort), [toy.trained(cohort, seed) for seed in range(2)], toy.x(3, batch=2)
    adapt = bind_slots(cohort, pooled(cohort, users), shared, SLOTS)
    together = toy.forward(toy.weights, adapt, x)
    alone = [toy.forward(toy.weights, bind(cohort, user, shared), x) for user in users]
    for slot, whole in enumerate(alone):
        np.testing.assert_allclose(together[slot == SLOTS], whole[slot == SLOTS], rtol=1e-5, atol=1e-5)
    bits = toy.op_by_op(adapt, x)[SLOTS == -1]
    np.testing.assert_array_equal(bits, toy.op_by_op(NO_ADAPT, x)[SLOTS == -1])


@pytest.mark.parametrize("method", ["lora", "lora_xs", "reft"])  # two kernels' and one gathered
def test_only_its_own_tokens_train_an_adapter(toy, method):
    """Invariant 2, inside one text."""
    cohort = toy.cohort(row=method)
    shared, users, x = toy.shared(cohort), [toy.trained(cohort, seed) for seed in range(2)], toy.x(3, batch=2)
    pool = pooled(cohort, users)

    def loss(pool, slot):
        out = toy.forward(toy.weights, bind_slots(cohort, pool, shared, SLOTS), x)
        return jnp.sum(jnp.square(jnp.where((slot == SLOTS)[..., None], out, 0.0)))

    gradient = jax.jit(jax.grad(loss))(pool, 1)
    for name, layered in cohort.layered.items():
        for leaf in gradient[name].values():
            zero, own = (np.asarray(leaf[:, slot] if layered else leaf[slot]) for slot in (0, 1))
            assert not zero.any()
    assert own.any()


def test_a_whole_row_of_one_slot_is_the_rows_slot(toy):
    cohort = toy.cohort(row="lora")
    shared, users, x = toy.shared(cohort), [toy.trained(cohort, seed) for seed in range(2)], toy.x(3, batch=2)
    pool, rows = pooled(cohort, users), jnp.asarray([1, 0])
    weight = jnp.asarray([0.5, 2.0])
    by_row = toy.forward(toy.weights, bind_slots(cohort, pool, shared, rows, weight_B=weight), x)
    tokens = jnp.broadcast_to(rows[:, None], (2, 5))
    by_token = toy.forward(toy.weights, bind_slots(cohort, pool, shared, tokens, weight_B=weight), x)
    np.testing.assert_allclose(by_token, by_row, rtol=1e-5, atol=1e-5)


def test_a_prompt_is_not_a_tokens(toy):
    cohort = toy.cohort(row="prompt")
    state = pooled(cohort, [toy.init(cohort, jax.random.key(0))] * 2)
    with pytest.raises(ConfigError, match="virtual tokens"):
        bind_slots(cohort, state, toy.shared(cohort), SLOTS)
