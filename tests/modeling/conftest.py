"""Tiny configs of each family, and a mesh of eight devices."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from popax.modeling.config import Llama3Rope, ModelConfig, YarnRope

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
}


@pytest.fixture(params=CONFIGS)
def config(request) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture
def tiny() -> ModelConfig:
    return CONFIGS["qwen3"]


@pytest.fixture
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
