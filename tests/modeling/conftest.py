"""Tiny models of each family, and a mesh of eight devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from popax.modeling.block_config import MLAConfig, MoEConfig
from popax.modeling.config import Llama3Rope, ModelConfig, YarnRope
from popax.modeling.model import Model

SHAPE = {
    "vocab_size": 64,
    "embed_dim": 32,
    "ffw_dim": 48,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_seq_len": 64,
}
CONFIGS = {
    "llama": ModelConfig(**SHAPE),
    "llama3": ModelConfig(
        **SHAPE,
        rope_scaling=Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16),
        rope_layout="interleaved",
        output_bias=True,
        mlp_bias=True,
    ),
    "qwen2": ModelConfig(
        **SHAPE, attention_bias=True, tied_embeddings=True, rope_scaling=YarnRope(factor=4.0, original_max_seq_len=16)
    ),
    "qwen3": ModelConfig(**SHAPE, qk_norm=True),
    "qwen3_moe": ModelConfig(
        **SHAPE, qk_norm=True, moe=MoEConfig(num_experts=8, experts_per_token=2, expert_ffw_dim=16)
    ),
    "deepseek": ModelConfig(
        **SHAPE | {"num_kv_heads": 4, "head_dim": 12},
        rope_scaling=YarnRope(factor=4.0, original_max_seq_len=16, mscale=1.0, mscale_all_dim=1.0),
        rope_layout="interleaved",
        moe=MoEConfig(
            num_experts=8,
            experts_per_token=3,
            expert_ffw_dim=16,
            shared_ffw_dim=24,
            first_dense_layers=1,
            scoring="sigmoid",
            routed_scaling=2.5,
            num_groups=4,
            top_groups=2,
            correction_bias=True,
        ),
        mla=MLAConfig(q_latent_dim=20, kv_latent_dim=16, nope_head_dim=8, rope_head_dim=4, v_head_dim=10),
    ),
}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A model with its random weights; its programs are compiled once for all tests."""

    model: Model
    params: dict

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def forward(self, params, tokens, **options):
        return _forward(self.model, params, tokens, **options)

    def tokens(self, *shape: int, seed: int = 0) -> jax.Array:
        return jnp.asarray(np.random.default_rng(seed).integers(0, self.config.vocab_size, shape), jnp.int32)


_forward = jax.jit(lambda model, params, tokens, **options: model(params, tokens, **options), static_argnums=0)


@pytest.fixture(scope="session", params=CONFIGS)
def family(request) -> Tiny:
    """A tiny model of each family."""
    model = Model(CONFIGS[request.param])
    return Tiny(model, model.init(jax.random.key(0)))


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """One tiny model, where the family does not matter."""
    model = Model(CONFIGS["qwen3"])
    return Tiny(model, model.init(jax.random.key(0)))


@pytest.fixture(scope="session")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
