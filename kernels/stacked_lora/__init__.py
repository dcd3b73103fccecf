"""Low-rank deltas for a stack of users with equally many tokens: delta_n = s_n (x_n A_n^T) B_n."""

from popax.kernels.stacked_lora.api import lora

__all__ = ["lora"]
