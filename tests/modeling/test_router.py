"""Routing against a plain loop over tokens: softmax and sigmoid, groups, correction bias, ties."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from popax.errors import ConfigError
from popax.modeling.block_config import MoEConfig
from popax.modeling.router import Router, combination_weights, scores, select
from popax.types import NOT_RECORDED

SIGMOID = MoEConfig(num_experts=12, experts_per_token=3, expert_ffw_dim=4, scoring="sigmoid", routed_scaling=2.5)
CONFIGS = {
    "softmax": MoEConfig(num_experts=12, experts_per_token=3, expert_ffw_dim=4),
    "softmax_not_normalised": MoEConfig(num_experts=12, experts_per_token=3, expert_ffw_dim=4, normalize_top_k=False),
    "sigmoid_biased": dataclasses.replace(SIGMOID, correction_bias=True),
    "grouped": dataclasses.replace(SIGMOID, correction_bias=True, num_groups=4, top_groups=2),
    "one_group": dataclasses.replace(SIGMOID, num_groups=3, top_groups=1),
}


def one_token(logits: np.ndarray, bias: np.ndarray, config: MoEConfig) -> tuple[list[int], list[float]]:
    plain = np.exp(logits) / np.exp(logits).sum() if config.scoring == "softmax" else 1 / (1 + np.exp(-logits))
    size = config.num_experts // config.num_groups
    groups = [list(range(start, start + size)) for start in range(0, config.num_experts, size)]
    ranked = plain + bias
    groups.sort(key=lambda group: -sum(sorted(ranked[group])[-2:]))
    allowed = [expert for group in groups[: config.top_groups] for expert in group]
    chosen = sorted(allowed, key=lambda expert: -ranked[expert])[: config.experts_per_token]
    weights = plain[chosen] / (plain[chosen].sum() if config.normalize_top_k else 1.0)
    return chosen, list(weights * config.routed_scaling)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_token_goes_where_a_loop_sends_it(name):
    config, rng = CONFIGS[name], np.random.default_rng(0)
    logits_MxE = rng.normal(size=(50, 12)).astype(np.float32)
    bias_E = rng.normal(size=12).astype(np.float32) * config.correction_bias
    scores_MxE = scores(jnp.asarray(logits_MxE), config)
    expert_MxK = select(scores_MxE, jnp.asarray(bias_E) if config.correction_bias else None, config)
    weight_MxK = combination_weights(scores_MxE, expert_MxK, config)
    assert (expert_MxK.dtype, weight_MxK.dtype) == (jnp.int32, jnp.float32)
    for token in range(50):
        chosen, weights = one_token(logits_MxE[token].astype(np.float64), bias_E, config)
        assert expert_MxK[token].tolist() == chosen
        np.testing.assert_allclose(weight_MxK[token], weights, rtol=1e-5)


def test_scores_have_gradients_and_the_choice_has_none():
    config, logits = CONFIGS["grouped"], jax.random.normal(jax.random.key(0), (5, 12))

    def chosen_sum(logits, bias):
        found = scores(logits, config)
        return jnp.sum(jnp.square(combination_weights(found, select(found, bias, config), config)))

    dlogits, dbias = jax.grad(chosen_sum, argnums=(0, 1))(logits, jnp.zeros(12))
    assert np.abs(dlogits).max() > 0
    assert np.count_nonzero(dlogits) == 5 * config.experts_per_token
    assert not np.asarray(dbias).any()


@pytest.mark.parametrize("name", CONFIGS)
def test_recorded_experts_take_the_place_of_the_choice_and_weights_stay_those_of_the_logits(name):
    config, rng = CONFIGS[name], np.random.default_rng(1)
    router = Router("router", 6, config, param_dtype="float32", rngs=nnx.Rngs(params=0))
    logits_MxE = jnp.asarray(rng.normal(size=(50, 12)), jnp.float32)
    live_MxK, _ = router.choose(logits_MxE)
    # Any experts at all, of any group: limits of groups hold where the record was made, not again here.
    recorded_MxK = rng.permuted(np.tile(np.arange(12), (50, 1)), axis=1)[:, :3].astype(np.int16)
    recorded_MxK[::7] = NOT_RECORDED
    expert_MxK, weight_MxK = router.choose(logits_MxE, jnp.asarray(recorded_MxK))
    unrecorded = np.arange(50) % 7 == 0
    np.testing.assert_array_equal(expert_MxK, np.where(unrecorded[:, None], live_MxK, recorded_MxK))
    assert (np.sort(live_MxK[~unrecorded]) != np.sort(recorded_MxK[~unrecorded])).any(axis=1).mean() > 0.5
    logits_MxE = np.asarray(logits_MxE, np.float64)
    plain_MxE = 1 / (1 + np.exp(-logits_MxE))
    if config.scoring == "softmax":
        plain_MxE = np.exp(logits_MxE) / np.exp(logits_MxE).sum(axis=1, keepdims=True)
    wanted_MxK = np.stack([plain[chosen] for plain, chosen in zip(plain_MxE, np.asarray(expert_MxK), strict=True)])
    wanted_MxK /= wanted_MxK.sum(axis=1, keepdims=True) if config.normalize_top_k else 1.0
    np.testing.assert_allclose(weight_MxK, wanted_MxK * config.routed_scaling, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts=0"),
        ({"num_experts": 40_000}, "num_experts=40000: at most 32767"),
        ({"scoring": "tanh"}, "tanh"),
        ({"num_groups": 5}, "num_groups=5.*equal size"),
        ({"num_groups": 12}, "two best experts"),
        ({"num_groups": 4, "top_groups": 5}, "top_groups=5"),
        ({"num_groups": 6, "top_groups": 1}, "experts_per_token=3: the chosen groups have 2"),
        ({"routed_scaling": float("nan")}, "routed_scaling"),
        ({"shared_ffw_dim": -1}, "shared_ffw_dim=-1"),
    ],
)
def test_a_value_out_of_range_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SIGMOID, **changes)
