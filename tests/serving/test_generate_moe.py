"""Mixed users on a mixture of experts with latent attention: each row is what its user alone would get."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.apply import bind, bind_slots
from popax.adapters.base import ALL_LINEAR, AdapterConfig
from popax.adapters.cohort import Cohort
from popax.modeling.block_config import MLAConfig, MoEConfig
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.serving.generate import generate
from popax.serving.pool import stack_slots
from popax.types import NO_ADAPT

MODEL = Model(
    ModelConfig(
        **{"vocab_size": 48, "embed_dim": 32, "ffw_dim": 40, "num_layers": 3, "num_heads": 4, "num_kv_heads": 4},
        **{"head_dim": 12, "max_seq_len": 64},
        moe=MoEConfig(
            **{"num_experts": 8, "experts_per_token": 2, "expert_ffw_dim": 16, "shared_ffw_dim": 16},
            **{"first_dense_layers": 1, "scoring": "sigmoid", "correction_bias": True},
        ),
        mla=MLAConfig(kv_latent_dim=16, nope_head_dim=8, rope_head_dim=4, v_head_dim=8),
    )
)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [1, 2, 3]]
SLOTS = [0, 1, 1, -1]
# With an adapter on kv_b_proj decode expands the cache, without it is absorbed.
TARGETS = {
    "all": (ALL_LINEAR, r".*experts\..*"),
    "not_kv_b": (r"layers\..*\.(q|kv_a|o|gate|up|down)_proj", r"layers\.moe\.router"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "quantise"), [("all", None), ("not_kv_b", "int8")])
def test_invariant_5_a_batch_of_mixed_users_equals_each_user_alone(name, quantise):
    model = Model(dataclasses.replace(MODEL.config, quantise=quantise))
    params = model.init(jax.random.key(0))
    cohort = Cohort.of(AdapterConfig(rank=2, targets=TARGETS[name]), model.sites())
    users = [
        jax.tree.map(lambda leaf, key=key: 0.3 * jax.random.normal(key, leaf.shape), cohort.init(key))
        for key in jax.random.split(jax.random.key(1), 2)
    ]
    mixed = bind_slots(cohort, stack_slots(cohort, users), {}, jnp.asarray(SLOTS, jnp.int32))
    together = generate(model, params, PROMPTS, adapt=mixed, max_new_tokens=8)
    base = [row.tokens.tolist() for row in generate(model, params, PROMPTS, max_new_tokens=8)]
    for row, slot in enumerate(SLOTS):
        adapt = NO_ADAPT if slot < 0 else bind(cohort, users[slot], {})
        (alone,) = generate(model, params, [PROMPTS[row]], adapt=adapt, max_new_tokens=8)
        np.testing.assert_array_equal(together[row].tokens, alone.tokens)
        assert (slot < 0) == (alone.tokens.tolist() == base[row])
