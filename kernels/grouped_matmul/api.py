"""The op as the rest of popax calls it.

Groups are consecutive: sizes_E[e] rows of group e follow those of group e - 1. Results are unspecified in rows beyond
the last group; they must not be read. Nothing here has a derivative: its callers write theirs out.
"""

import jax
import jax.numpy as jnp

from popax.kernels import dispatch
from popax.kernels.grouped_matmul import pallas_gpu, reference
from popax.kernels.grouped_matmul.arg_specs import ArgSpec

_BLOCKS = {"pallas_triton": pallas_gpu.Blocks}
# XLA multiplies every row by every group's matrix on GPU.
_UNTUNED = {"cuda": "pallas_triton"}


def grouped_matmul(rows_RxA: jax.Array, w_ExAxB: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """rows[r] w[group of r], [R, B] in rows' dtype; sums are float32. w has rows' dtype, or a narrower one (int8, say)
    whose values are converted where they are used."""
    forms = {"xla": reference.matmul, "pallas_triton": pallas_gpu.matmul}
    return _run("grouped_matmul.forward", forms, rows_RxA, w_ExAxB, sizes_E)


def grouped_matmul_back(rows_RxB: jax.Array, w_ExAxB: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """rows[r] w[group of r]^T, [R, A]: how gradients go back through `grouped_matmul` to its rows."""
    forms = {"xla": reference.back, "pallas_triton": pallas_gpu.back}
    return _run("grouped_matmul.back", forms, rows_RxB, w_ExAxB, sizes_E)


def grouped_outer(
    left_RxA: jax.Array, right_RxB: jax.Array, sizes_E: jax.Array, *, dtype: jnp.dtype | None = None
) -> jax.Array:
    """The sum of left[r]^T right[r] over the rows of each group, [E, A, B]; zero for a group without rows.

    dtype: of the sums, default left's.
    """
    return reference.outer(left_RxA, right_RxB, sizes_E, dtype=dtype)


def _run(op: str, forms, rows: jax.Array, w_ExAxB: jax.Array, sizes_E: jax.Array) -> jax.Array:
    spec = ArgSpec("", rows.shape[0], *w_ExAxB.shape)
    options = {"dtype": rows.dtype.name, "block_types": _BLOCKS, "untuned": _UNTUNED}
    return dispatch.run(op, forms, spec, rows, w_ExAxB, sizes_E, **options)
