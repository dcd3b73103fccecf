"""Data: users' text from files to packed batches, and tokenizers."""

from popax.data.pipeline import PipelineConfig, UserPipeline
from popax.data.tokenize import Tokenizer, load_tokenizer, train_bpe
from popax.data.users import UserDataset

__all__ = ["PipelineConfig", "Tokenizer", "UserDataset", "UserPipeline", "load_tokenizer", "train_bpe"]
