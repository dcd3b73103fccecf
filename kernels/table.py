"""Every op: what tests compile and compare, and what the tuner and the benchmark walk over."""

from popax.kernels.cross_entropy.ops import OPS as CROSS_ENTROPY
from popax.kernels.grouped_matmul.ops import OPS as GROUPED_MATMUL
from popax.kernels.indexed_lora.ops import OPS as INDEXED_LORA
from popax.kernels.op import Op
from popax.kernels.shared_core.ops import OPS as SHARED_CORE
from popax.kernels.stacked_lora.ops import OPS as STACKED_LORA

OPS: tuple[Op, ...] = (*STACKED_LORA, *INDEXED_LORA, *SHARED_CORE, *CROSS_ENTROPY, *GROUPED_MATMUL)
