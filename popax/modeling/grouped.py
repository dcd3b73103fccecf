"""Grouped products of rows and experts' weights, which may be quantised: `popax.kernels.grouped_matmul` for weights."""

from typing import TypeGuard

import jax
import jax.numpy as jnp

from popax.kernels.grouped_matmul import grouped_matmul, grouped_matmul_back
from popax.modeling.quantised import Quantised, Weight, dense, per_channel, scaled


def grouped_product(rows_RxA: jax.Array, w_ExAxB: Weight, sizes_E: jax.Array) -> jax.Array:
    """rows[r] w[group of r], [R, B] in rows' dtype; rows beyond the last group are not meant."""
    if not _stays_narrow(w_ExAxB):
        return grouped_matmul(rows_RxA, dense(w_ExAxB, rows_RxA.dtype), sizes_E)
    y_RxB = grouped_matmul(rows_RxA, w_ExAxB.values, sizes_E)
    return scaled(y_RxB, _row_scales(w_ExAxB, sizes_E, rows_RxA.shape[0]))


def grouped_product_back(rows_RxB: jax.Array, w_ExAxB: Weight, sizes_E: jax.Array) -> jax.Array:
    """rows[r] w[group of r]^T, [R, A]: how gradients go back through `grouped_product` to its rows."""
    if not _stays_narrow(w_ExAxB):
        return grouped_matmul_back(rows_RxB, dense(w_ExAxB, rows_RxB.dtype), sizes_E)
    rows_RxB = scaled(rows_RxB, _row_scales(w_ExAxB, sizes_E, rows_RxB.shape[0]))
    return grouped_matmul_back(rows_RxB, w_ExAxB.values, sizes_E)


def _stays_narrow(weight: Weight) -> TypeGuard[Quantised]:
    """Whether the product takes the values as they are; else all experts of a device are converted before it."""
    return isinstance(weight, Quantised) and per_channel(weight)


def _row_scales(weight: Quantised, sizes_E: jax.Array, rows: int) -> jax.Array:
    """Each row's factors, those of its group's output channels: [R, B]; any in rows of no group."""
    groups_E = jnp.arange(sizes_E.shape[0], dtype=jnp.int32)
    return weight.scales[jnp.repeat(groups_E, sizes_E, total_repeat_length=rows), 0]
