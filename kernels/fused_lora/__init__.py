"""A frozen base product and its users' low-rank updates in one pass: y_n = (x_n W) w_scale + s_n (x_n A_n^T) B_n."""

from popax.kernels.fused_lora.api import fused_lora, fused_lora_indexed

__all__ = ["fused_lora", "fused_lora_indexed"]
