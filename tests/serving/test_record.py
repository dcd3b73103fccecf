"""What generation records is what a full forward pass computes, for ragged prompts and past the end token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.apply import bind
from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.modeling.block_config import MoEConfig
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.serving.generate import generate
from popax.serving.sampling import Sampling
from popax.types import NO_ADAPT

MOE = Model(
    ModelConfig(
        **{"vocab_size": 32, "embed_dim": 16, "ffw_dim": 24, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1},
        **{"head_dim": 8, "max_seq_len": 64},
        moe=MoEConfig(num_experts=12, experts_per_token=3, expert_ffw_dim=8, first_dense_layers=1),
    )
)
PROMPTS = [[5, 17, 3], [9], [20, 21, 22, 23, 24, 2, 7, 8, 9]]
RULE = Sampling(temperature=1.0)
STEPS = 11


@pytest.fixture(scope="module")
def moe_params():
    return MOE.init(jax.random.key(3))


def check_against_full_forward(model, params, rows, adapt=NO_ADAPT):
    @jax.jit
    def full(tokens_1xT):
        x_BxTxD, _, routes = model.forward(params, tokens_1xT, adapt=adapt, record_routes=True)
        return jax.nn.log_softmax(model.logits(params, x_BxTxD)), routes

    for prompt, row in zip(PROMPTS, rows, strict=True):
        record, given = row.record, len(prompt)
        length = len(record.tokens_T)
        assert record.prompt_length == given
        assert record.tokens_T[:given].tolist() == prompt
        assert record.tokens_T[given : given + len(row.tokens)].tolist() == row.tokens.tolist()
        assert length == given + len(row.tokens) + row.ended
        padded = np.zeros((1, 24), np.int32)  # later positions are invisible to earlier ones
        padded[0, :length] = record.tokens_T
        logps_TxV, routes = full(jnp.asarray(padded))
        assert record.routes_TxLxK.shape == (length, *model.routes_shape)
        if routes is not None:
            np.testing.assert_array_equal(record.routes_TxLxK, routes[0, :length])
        expected = np.take_along_axis(np.asarray(logps_TxV)[0, : length - 1], record.tokens_T[1:, None], axis=1)[:, 0]
        np.testing.assert_allclose(record.logps_T[given:], expected[given - 1 :], rtol=1e-5, atol=1e-5)
        assert np.isnan(record.logps_T[:given]).all()


def test_routes_and_log_probabilities_are_those_of_the_full_forward_pass(moe_params):
    options = {"max_new_tokens": STEPS, "sampling": RULE}
    rows = generate(MOE, moe_params, PROMPTS, **options, record_routes=True)
    check_against_full_forward(MOE, moe_params, rows)
    routes = np.concatenate([row.record.routes_TxLxK for row in rows])
    assert routes.dtype == np.int16
    assert len(np.unique(routes)) == 12, "a router that always chooses the same experts tells nothing"
    plain = generate(MOE, moe_params, PROMPTS, **options)
    assert [row.tokens.tolist() for row in plain] == [row.tokens.tolist() for row in rows]
    assert all(row.record is None for row in plain)


def test_what_is_recorded_behind_virtual_tokens_is_of_the_texts_own_tokens(moe_params):
    """And a replay of it, whose routes the policy objective gives to `forward`, is the same forward pass."""
    cohort = Cohort.of(AdapterConfig(method="prompt", rank=3), MOE.sites())
    shared = cohort.shared(*MOE.site_arrays(moe_params))
    state = {"embed": {"prompt": jax.random.normal(jax.random.key(2), (3, 16))}}
    adapt = bind(cohort, state, shared)
    options = {"max_new_tokens": STEPS, "sampling": RULE, "record_routes": True}
    rows = generate(MOE, moe_params, PROMPTS, adapt=adapt, **options)
    check_against_full_forward(MOE, moe_params, rows, adapt)
    record = rows[2].record
    assert record is not None
    tokens, routes = jnp.asarray(record.tokens_T[None]), jnp.asarray(record.routes_TxLxK[None])
    given, _ = MOE.hidden(moe_params, tokens, adapt=adapt, routes_BxTxLxK=routes)
    np.testing.assert_allclose(given, MOE.hidden(moe_params, tokens, adapt=adapt)[0], rtol=1e-5, atol=1e-5)
    base = generate(MOE, moe_params, PROMPTS, **options)
    assert [row.tokens.tolist() for row in rows] != [row.tokens.tolist() for row in base]


def test_the_end_token_is_an_action_and_is_recorded(moe_params):
    free = generate(MOE, moe_params, PROMPTS, max_new_tokens=STEPS, sampling=RULE)
    end = int(free[0].tokens[3])
    rows = generate(MOE, moe_params, PROMPTS, max_new_tokens=STEPS, sampling=RULE, end_id=end, record_routes=True)
    assert rows[0].ended
    assert rows[0].record is not None
    assert rows[0].record.tokens_T[-1] == end
    check_against_full_forward(MOE, moe_params, rows)


def test_a_model_without_mixtures_records_log_probabilities_alone(model, params):
    rows = generate(model, params, PROMPTS, max_new_tokens=STEPS, sampling=RULE, record_routes=True)
    check_against_full_forward(model, params, rows)
