"""Rows of many slots on GPU, forward and backward: tiles of each run of equal slots, products in Pallas-Triton."""

from typing import Any

import jax
import jax.numpy as jnp

from popax.kernels import triton_lora
from popax.kernels.rows import nobody, segment_sums
from popax.kernels.triton import Blocks, run_tiles, sorted_runs

NAME = "popax_indexed_lora"


def forward(
    x_MxD: jax.Array,
    a_SxRxD: jax.Array,
    b_SxRxF: jax.Array,
    scale_S: jax.Array,
    slot_M: jax.Array,
    rank_S: jax.Array,
    y_MxF: jax.Array | None = None,
    *,
    most_runs: int | None = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """(y + s (x A[slot]^T) B[slot], h_RxM), as `reference_grouped.forward`.

    Work: a tile's rows for each run of equal slots, so rows should come in runs. most_runs: a bound on their number,
    else that of the rows. Raises NotImplementedError for float64.
    """
    triton_lora.check(x_MxD)
    rows = x_MxD.shape[0]
    runs = rows if most_runs is None else most_runs
    blocks = blocks or default_blocks(rows, runs)
    tiles = run_tiles(slot_M, a_SxRxD.shape[0], blocks.tile, runs)
    operands = (x_MxD, a_SxRxD, b_SxRxF, scale_S, tiles, rank_S, y_MxF, blocks)
    return triton_lora.forward(*operands, name=NAME, interpret=interpret)


def backward(
    g_MxF: jax.Array,
    x_MxD: jax.Array,
    h_RxM: jax.Array,
    a_SxRxD: jax.Array,
    b_SxRxF: jax.Array,
    scale_S: jax.Array,
    slot_M: jax.Array,
    rank_S: jax.Array,
    *,
    most_runs: int | None = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(dx, dA, dB, ds), as `reference_grouped.backward`; exact zeros where a slot has no rows, and beyond a rank."""
    triton_lora.check(x_MxD)
    rows, (slots, rank, _) = x_MxD.shape[0], a_SxRxD.shape
    most = rows if most_runs is None else most_runs
    blocks = blocks or default_blocks(rows, most)
    tiles, runs = run_tiles(slot_M, slots, blocks.tile, most), sorted_runs(slot_M, slots, most)
    operands = (g_MxF, x_MxD, h_RxM, a_SxRxD, b_SxRxF, scale_S, tiles, runs, rank_S, blocks)
    dx_MxD, da_SxRxD, db_SxRxF, gb_RxM = triton_lora.backward(*operands, name=NAME, interpret=interpret)
    key_M = nobody(slot_M, slots)
    rank_M = jnp.concatenate([rank_S, jnp.zeros((1,), rank_S.dtype)])[key_M]
    live_RxM = jnp.arange(rank)[:, None] < rank_M[None, :]
    products_RxM = jnp.where(live_RxM, gb_RxM.astype(jnp.float32) * h_RxM.astype(jnp.float32), 0.0)
    ds_S = segment_sums(jnp.sum(products_RxM, axis=0), key_M, slots)
    return dx_MxD, da_SxRxD, db_SxRxF, ds_S.astype(scale_S.dtype)


def default_blocks(rows: int, runs: int) -> Blocks:
    """Until a device has been tuned: tall tiles where runs are long."""
    return Blocks(tile=64 if rows >= 64 * runs else 16, block=64, warps=4, stages=3, joint=256)
