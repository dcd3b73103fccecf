"""Low-rank deltas for token groups of different users: delta_g = s (x_g A[slot_g]^T) B[slot_g]."""

from popax.kernels.indexed_lora.api import indexed_lora, indexed_lora_sites
from popax.kernels.indexed_lora.slots import take_slots

__all__ = ["indexed_lora", "indexed_lora_sites", "take_slots"]
