"""Serving: mixed users in one batch."""

from popax.serving.sampling import Sampling
from popax.serving.text import generate_text

__all__ = ["Sampling", "generate_text"]
