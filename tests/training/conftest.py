"""A tiny base, and users who each repeat a phrase of their own."""

import jax
import numpy as np
import pytest

from popax.adapters.base import AdapterConfig
from popax.data.pipeline import PipelineConfig, UserPipeline
from popax.data.tokenize import load_tokenizer
from popax.data.users import UserDataset
from popax.modeling.base import Base
from popax.modeling.config import ModelConfig
from popax.modeling.digest import digest_params
from popax.modeling.model import Model
from popax.population.early_stop import EarlyStop
from popax.training.config import TrainConfig

# Three of the seven maps, all of other widths: a run treats a site like any other, and tracing takes its time by site.
SOME_SITES = r"layers\..*(q_proj|v_proj|down_proj)"


@pytest.fixture(scope="session")
def base() -> Base:
    tokenizer = load_tokenizer("byte")
    model = Model(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            embed_dim=16,
            ffw_dim=24,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            max_seq_len=64,
            tied_embeddings=True,
        )
    )
    params = model.init(jax.random.key(0))
    return Base(model=model, params=params, digest=digest_params(params), source="test")


def phrases(users: int, seed: int = 0) -> UserDataset:
    """User i's examples repeat a random word of their own; some users have more text than others."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(users)]
    return UserDataset.from_examples(
        {f"user-{i:03d}": [f"{word} {j % 3} " * 3 for j in range(6 + i % 4)] for i, word in enumerate(words)}
    )


@pytest.fixture(scope="session")
def pipeline_of():
    def make(users: int) -> UserPipeline:
        config = PipelineConfig(seq_len=16, batch_size=2, past_fraction=0.8, validation_fraction=0.2)
        return UserPipeline(phrases(users), load_tokenizer("byte"), config)

    return make


@pytest.fixture(scope="session")
def train_config():
    def make(**changes) -> TrainConfig:
        defaults = {
            "adapter": AdapterConfig(rank=2, targets=SOME_SITES),
            "slots": 4,
            "steps": 6,
            "learning_rate": 1e-2,
            "early_stop": EarlyStop(every=2, patience=2),
            "checkpoint_every": 4,
        }
        return TrainConfig(**{**defaults, **changes})

    return make
