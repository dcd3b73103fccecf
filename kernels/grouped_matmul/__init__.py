"""Products of consecutive groups of rows, each with its own matrix: the arithmetic of a mixture of experts."""

from popax.kernels.grouped_matmul.api import grouped_matmul, grouped_matmul_back, grouped_outer

__all__ = ["grouped_matmul", "grouped_matmul_back", "grouped_outer"]
