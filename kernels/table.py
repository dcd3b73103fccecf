"""Every op: what tests compile and compare, and what the tuner and the benchmark walk over."""

from popax.kernels.indexed_lora.ops import OPS as INDEXED_LORA
from popax.kernels.op import Op
from popax.kernels.stacked_lora.ops import OPS as STACKED_LORA

OPS: tuple[Op, ...] = (*STACKED_LORA, *INDEXED_LORA)
