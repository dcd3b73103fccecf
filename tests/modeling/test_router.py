"""Routing against a plain loop over tokens: softmax and sigmoid, groups, correction bias, ties."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.errors import ConfigError
from popax.modeling.block_config import MoEConfig
from popax.modeling.router import combination_weights, scores, select

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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts=0"),
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
