"""Base models of the Llama and Qwen families, from Hugging Face directories or popax's own."""

from popax.modeling.base import Base, load_base, new_base, save_base
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model

__all__ = ["Base", "Model", "ModelConfig", "load_base", "new_base", "save_base"]
