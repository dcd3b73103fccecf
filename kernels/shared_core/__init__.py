"""Deltas in a basis that all users share, with a small core of each user's own: s core(x A^T) B."""

from popax.kernels.shared_core.api import indexed_shared_core, shared_core

__all__ = ["indexed_shared_core", "shared_core"]
