"""What the demo runs, sized for two processor cores."""

import dataclasses

from popax.adapters.base import AdapterConfig
from popax.data.pipeline import PipelineConfig
from popax.evaluation.columns import EvalConfig
from popax.modeling.config import ModelConfig
from popax.population.early_stop import EarlyStop
from popax.training.config import TrainConfig
from popax.training.pretrain import PretrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """users: packages in the population; max_user_bytes: larger packages go to the base's text, with all small ones.

    The base is a byte-level-BPE decoder of `vocab_size` tokens; base_* belong to its pretraining, the others to the
    users' adapters. generate_users: how many users share the one generation batch.
    """

    users: int = 64
    max_user_bytes: int = 150_000
    vocab_size: int = 2048
    embed_dim: int = 128
    num_layers: int = 4
    base_steps: int = 600
    base_batch_size: int = 16
    base_seq_len: int = 128
    base_learning_rate: float = 4e-3
    rank: int = 8
    alpha: float = 16.0
    steps: int = 48
    learning_rate: float = 2e-3
    batch_size: int = 2
    seq_len: int = 128
    validate_every: int = 8
    patience: int = 6
    validation_rows: int = 8
    held_out_rows: int = 16
    generate_users: int = 4
    new_tokens: int = 48
    seed: int = 0

    def model(self, vocab_size: int) -> ModelConfig:
        return ModelConfig(
            vocab_size=vocab_size,
            embed_dim=self.embed_dim,
            ffw_dim=3 * self.embed_dim,
            num_layers=self.num_layers,
            num_heads=self.embed_dim // 32,
            num_kv_heads=max(1, self.embed_dim // 64),
            head_dim=32,
            tied_embeddings=True,
            max_seq_len=512,
        )

    def pretrain(self) -> PretrainConfig:
        return PretrainConfig(
            steps=self.base_steps,
            learning_rate=self.base_learning_rate,
            warmup_steps=self.base_steps // 10,
            seed=self.seed,
        )

    def base_pipeline(self) -> PipelineConfig:
        return PipelineConfig(
            seq_len=self.base_seq_len,
            batch_size=self.base_batch_size,
            past_fraction=1.0,
            validation_fraction=0.0,
            seed=self.seed,
        )

    def pipeline(self) -> PipelineConfig:
        return PipelineConfig(
            seq_len=self.seq_len,
            batch_size=self.batch_size,
            past_fraction=0.8,
            validation_fraction=0.15,
            seed=self.seed,
        )

    def train(self) -> TrainConfig:
        return TrainConfig(
            adapter=AdapterConfig(rank=self.rank, alpha=self.alpha),
            slots=self.users,
            steps=self.steps,
            learning_rate=self.learning_rate,
            early_stop=EarlyStop(every=self.validate_every, patience=self.patience),
            validation_rows=self.validation_rows,
            seed=self.seed,
        )

    def evaluation(self) -> EvalConfig:
        return EvalConfig(group=self.users, rows=2, max_rows=self.held_out_rows)
