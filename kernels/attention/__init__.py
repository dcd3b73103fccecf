"""Causal attention over packed rows, with memory linear in the row."""

from popax.kernels.attention.api import packed_attention
from popax.kernels.attention.reference import sees

__all__ = ["packed_attention", "sees"]
