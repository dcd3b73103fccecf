"""A population run in a process of its own, for test_kill: prints a line a round, until it is done or killed."""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

import jax

from popax.adapters.base import AdapterConfig
from popax.data.pipeline import PipelineConfig, UserPipeline
from popax.data.tokenize import load_tokenizer
from popax.data.users import UserDataset
from popax.modeling.base import new_base
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.population.early_stop import EarlyStop
from popax.store.catalog import Catalog
from popax.training.config import TrainConfig
from popax.training.run import train_population

USERS, SLOTS = 256, 32


def users() -> list[str]:
    return [f"user-{index:03d}" for index in range(USERS)]


def run(place: Path, *, slots: int = SLOTS, chosen: list[str] | None = None, on_round=lambda *_: None) -> Catalog:
    """Train into `place`; users with more text have more rows, and stop at different rounds."""
    tokenizer = load_tokenizer("byte")
    model = Model(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            embed_dim=8,
            ffw_dim=8,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=8,
        )
    )
    texts = {user: [f"{user} says {index % 3} " * 2 for index in range(5 + hash_of(user) % 5)] for user in users()}
    pipeline = UserPipeline(
        UserDataset.from_examples(texts), tokenizer, PipelineConfig(seq_len=16, batch_size=2, validation_fraction=0.2)
    )
    config = TrainConfig(
        adapter=AdapterConfig(rank=2),
        slots=slots,
        steps=5,
        learning_rate=3e-2,
        early_stop=EarlyStop(every=2, patience=1),
        checkpoint_every=4,
    )
    catalog = Catalog.open(place / "catalog", create=True)
    base = new_base(model, model.init(jax.random.key(0)), source="test")
    train_population(base, pipeline, config, directory=place / "run", catalog=catalog, users=chosen, on_round=on_round)
    return catalog


def hash_of(user: str) -> int:
    return sum(map(ord, user))


if __name__ == "__main__":
    run(Path(sys.argv[1]), on_round=lambda seating, _: print(f"round {seating.iteration}", flush=True))
    print("done", flush=True)
