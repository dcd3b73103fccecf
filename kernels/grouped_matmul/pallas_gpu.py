"""Grouped products on GPU in Pallas-Triton: a program has a tile of one group's rows and a block of columns."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from popax.kernels import triton, triton_lora
from popax.kernels.rows import search

NAME = "popax_grouped_matmul"


class Blocks(NamedTuple):
    """tile: rows, block: columns of the result of one program; depth: features a step. Powers of two >= 16."""

    tile: int = 128
    block: int = 128
    depth: int = 64
    warps: int = 8
    stages: int = 3


def matmul(
    rows_RxA: jax.Array, w_ExAxB: jax.Array, sizes_E: jax.Array, *, blocks: Blocks | None = None, interpret: Any = False
) -> jax.Array:
    """As `reference.matmul`, in rows' dtype; w in that or in int8. Raises NotImplementedError for other dtypes."""
    return _product(rows_RxA, w_ExAxB, sizes_E, blocks, interpret, back=False)


def back(
    rows_RxB: jax.Array, w_ExAxB: jax.Array, sizes_E: jax.Array, *, blocks: Blocks | None = None, interpret: Any = False
) -> jax.Array:
    """As `reference.back`, in rows' dtype; w in that or in int8. Raises NotImplementedError for other dtypes."""
    return _product(rows_RxB, w_ExAxB, sizes_E, blocks, interpret, back=True)


def default_blocks(rows: int, groups: int) -> Blocks:
    """Until a device has been tuned: tiles about as tall as a group."""
    tile = 128 if rows >= 128 * groups else 64 if rows >= 64 * groups else 16
    return Blocks(tile, 128, 64, 8 if tile == 128 else 4, 3)


def candidates(rows: int, groups: int) -> tuple[Blocks, ...]:
    """Block sizes that are worth a clock, likely ones first."""
    own = default_blocks(rows, groups)
    tiles = [own.tile, *(tile for tile in (64, 128) if tile != own.tile and rows >= 32 * groups)]
    shapes = ((128, 64, 8, 3), (128, 64, 4, 3), (256, 64, 8, 3), (128, 32, 4, 4), (64, 64, 4, 4))
    return tuple(Blocks(tile, *shape) for tile in tiles for shape in shapes)


def _tiles(sizes_E: jax.Array, rows: int, tile: int) -> triton.Tiles:
    """A group's rows in tiles of its own; as many tiles as any sizes may need, the last of them empty."""
    groups, sizes_E = sizes_E.shape[0], sizes_E.astype(jnp.int32)
    ends_E = jnp.cumsum((sizes_E + (tile - 1)) // tile, dtype=jnp.int32)
    stop_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
    tile_P = jnp.arange(min(rows, pl.cdiv(rows, tile) + groups), dtype=jnp.int32)
    group_P = search(ends_E, tile_P, side="right")
    used_P, own_P = group_P < groups, jnp.minimum(group_P, groups - 1)
    before_P = ends_E[own_P] - (sizes_E[own_P] + (tile - 1)) // tile
    first_P = stop_E[own_P] - sizes_E[own_P] + (tile_P - before_P) * tile
    return triton.Tiles(own_P, jnp.where(used_P, first_P, 0), jnp.where(used_P, stop_E[own_P], 0))


def _product(rows, w_ExAxB, sizes_E, blocks: Blocks | None, interpret, *, back: bool) -> jax.Array:
    triton_lora.check(rows)
    if w_ExAxB.dtype not in (rows.dtype, jnp.int8):
        raise NotImplementedError(f"w is {w_ExAxB.dtype} beside rows in {rows.dtype}: the GPU form takes that or int8")
    (count, inner), groups = rows.shape, w_ExAxB.shape[0]
    blocks = blocks or default_blocks(count, groups)
    columns = w_ExAxB.shape[1] if back else w_ExAxB.shape[2]
    tiles = _tiles(sizes_E, count, blocks.tile)
    return pl.pallas_call(
        triton.named(NAME, _kernel, blocks=blocks, inner=inner, columns=columns, back=back),
        # Columns are the faster axis: programs side by side share their rows, and their group's matrix is still near.
        grid=(pl.cdiv(columns, blocks.block), tiles.slot_P.shape[0]),
        out_shape=jax.ShapeDtypeStruct((count, columns), rows.dtype),
        compiler_params=triton.parameters(blocks),
        cost_estimate=pl.CostEstimate(
            flops=2 * count * inner * columns,
            bytes_accessed=count * (inner + columns) * rows.dtype.itemsize + w_ExAxB.size * w_ExAxB.dtype.itemsize,
            transcendentals=0,
        ),
        name=NAME,
        interpret=interpret,
    )(*tiles, rows, w_ExAxB)


def _kernel(group, first, end, rows, w, out, *, blocks: Blocks, inner: int, columns: int, back: bool):
    block, program = pl.program_id(0), pl.program_id(1)
    row_t = first[program] + jnp.arange(blocks.tile, dtype=jnp.int32)
    mine_t = row_t < end[program]
    # A place beyond the array for the others: what stands there is somebody's.
    row_t = jnp.where(mine_t, row_t, rows.shape[0])
    column_c = block * blocks.block + jnp.arange(blocks.block, dtype=jnp.int32)
    inside_c, own = column_c < columns, group[program]

    def step(index, acc_txc):
        depth_d = index * blocks.depth + jnp.arange(blocks.depth, dtype=jnp.int32)
        inside_d = depth_d < inner
        x_txd = plgpu.load(
            rows.at[row_t[:, None], depth_d[None, :]], mask=mine_t[:, None] & inside_d[None, :], other=0.0
        )
        at = (own, column_c[None, :], depth_d[:, None]) if back else (own, depth_d[:, None], column_c[None, :])
        zero = 0 if jnp.issubdtype(w.dtype, jnp.integer) else 0.0
        w_dxc = plgpu.load(w.at[at], mask=inside_d[:, None] & inside_c[None, :], other=zero)
        return acc_txc + triton.product(x_txd, w_dxc.astype(x_txd.dtype))

    # An empty tile does no work.
    steps = jnp.int32(pl.cdiv(inner, blocks.depth)) * (end[program] > first[program]).astype(jnp.int32)
    acc_txc = jax.lax.fori_loop(jnp.int32(0), steps, step, jnp.zeros((blocks.tile, blocks.block), jnp.float32))
    stored = mine_t[:, None] & inside_c[None, :]
    plgpu.store(out.at[row_t[:, None], column_c[None, :]], acc_txc.astype(out.dtype), mask=stored)
