"""Three grouped products in Pallas-Triton, from which every op's GPU form is composed: shrink, expand, outer.

Rows of a flat [M, D] array are cut into tiles that never straddle two slots. A tile names its slot and its stretch of
an *order* of the rows; `row_M` maps the order to the array, so that nothing is sorted or padded in memory. A row of a
factor is read once a tile, in the tile's own rank; slot -1 reads and multiplies nothing.

Triton wants powers of two: ranks and columns beyond the real ones are masked, not stored.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

MIN_DOT = 16  # the least extent of a tensor core's operand


class Tiles(NamedTuple):
    """P tiles. slot_P: -1 where its rows have no adapter; first_P, end_P: its stretch of the order; row_M: the order.

    A tile may be empty (first == end).
    """

    slot_P: jax.Array
    first_P: jax.Array
    end_P: jax.Array
    row_M: jax.Array


class Blocks(NamedTuple):
    """tile: rows a program, 1 (products on the plain units) or a power of two >= 16. block: columns a step."""

    tile: int = 64
    block: int = 64
    warps: int = 4
    stages: int = 3


def stacked_tiles(users: int, tokens: int, tile: int) -> Tiles:
    """Every user has `tokens` consecutive rows: [users * tokens] in order."""
    per_user = pl.cdiv(tokens, tile)
    user_P = jnp.repeat(jnp.arange(users, dtype=jnp.int32), per_user)
    inside_P = jnp.tile(jnp.arange(per_user, dtype=jnp.int32) * tile, users)
    end_P = jnp.minimum(inside_P + tile, tokens)
    row_M = jnp.arange(users * tokens, dtype=jnp.int32)
    return Tiles(user_P, user_P * tokens + inside_P, user_P * tokens + end_P, row_M)


def sorted_tiles(slot_T: jax.Array, slots: int, tile: int) -> Tiles:
    """Rows ordered by slot, rows without an adapter last: at most ceil(T / tile) + min(S + 1, T) tiles.

    The arrays have that many; those beyond the needed ones are empty. A slot outside [0, S) is no adapter.
    """
    tokens = slot_T.shape[0]
    key_T = jnp.where((slot_T < 0) | (slot_T >= slots), slots, slot_T).astype(jnp.int32)
    row_T = jnp.argsort(key_T, stable=True).astype(jnp.int32)
    ordered_T = key_T[row_T]
    position_T = jnp.arange(tokens, dtype=jnp.int32)
    starts_T = jnp.concatenate([jnp.ones((1,), bool), ordered_T[1:] != ordered_T[:-1]])
    group_start_T = jax.lax.cummax(jnp.where(starts_T, position_T, 0))
    # A tile begins at a group's start and after every `tile` rows of it.
    begins_T = (position_T - group_start_T) % tile == 0
    most = pl.cdiv(tokens, tile) + min(slots + 1, tokens)
    (first_P,) = jnp.nonzero(begins_T, size=min(most, tokens), fill_value=tokens)
    first_P = first_P.astype(jnp.int32)
    next_P = jnp.concatenate([first_P[1:], jnp.full((1,), tokens, jnp.int32)])
    found_P = ordered_T[jnp.minimum(first_P, tokens - 1)]
    slot_P = jnp.where(found_P == slots, -1, found_P)
    return Tiles(slot_P, first_P, next_P, row_T)


def shrink(
    x_MxD: jax.Array,
    a_SxRxD: jax.Array,
    tiles: Tiles,
    rank_S: jax.Array | None,
    blocks: Blocks,
    *,
    name: str,
    interpret=False,
) -> jax.Array:
    """h[:, i] = A[slot] x_row(i): [R, M] in the tiles' order, x's dtype; zeros without an adapter and beyond a rank."""
    (rows, d_in), rank = x_MxD.shape, a_SxRxD.shape[1]
    kernel = functools.partial(_shrink, blocks=blocks, rank=rank, columns=d_in)
    return pl.pallas_call(
        kernel,
        grid=(tiles.slot_P.shape[0],),
        out_shape=jax.ShapeDtypeStruct((rank, rows), x_MxD.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        cost_estimate=_cost(2 * rows * rank * d_in, x_MxD, rows * rank * d_in, a_SxRxD),
        name=name,
        interpret=interpret,
    )(*tiles, _ranks(rank_S, a_SxRxD), x_MxD, a_SxRxD)


def expand(
    h_RxM: jax.Array,
    b_SxRxF: jax.Array,
    scale_S: jax.Array,
    tiles: Tiles,
    rank_S: jax.Array | None,
    y_MxF: jax.Array | None,
    blocks: Blocks,
    *,
    name: str,
    interpret=False,
) -> jax.Array:
    """out_row(i) = y_row(i) + s B[slot]^T h[:, i]: [M, F] in y's dtype, else h's. y's very bytes without an adapter."""
    (rank, rows), d_out = h_RxM.shape, b_SxRxF.shape[2]
    kernel = functools.partial(_expand, blocks=blocks, rank=rank, columns=d_out, has_y=y_MxF is not None)
    dtype = h_RxM.dtype if y_MxF is None else y_MxF.dtype
    return pl.pallas_call(
        kernel,
        grid=(tiles.slot_P.shape[0], pl.cdiv(d_out, blocks.block)),
        out_shape=jax.ShapeDtypeStruct((rows, d_out), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        cost_estimate=_cost(2 * rows * rank * d_out, h_RxM, rows * rank * d_out, b_SxRxF),
        name=name,
        interpret=interpret,
    )(
        *tiles,
        _ranks(rank_S, b_SxRxF),
        scale_S.astype(jnp.float32),
        h_RxM,
        b_SxRxF,
        *(() if y_MxF is None else (y_MxF,)),
    )


def outer(
    h_RxM: jax.Array,
    x_MxD: jax.Array,
    first_S: jax.Array,
    end_S: jax.Array,
    row_M: jax.Array,
    scale_S: jax.Array,
    blocks: Blocks,
    *,
    dtype,
    name: str,
    interpret=False,
) -> jax.Array:
    """g[s] = scale_s sum over i in [first_s, end_s) of h[:, i] x_row(i)^T: [S, R, D]; exact zeros for an empty slot."""
    (rank, rows), d_in, slots = h_RxM.shape, x_MxD.shape[1], first_S.shape[0]
    tile = max(blocks.tile, MIN_DOT)
    kernel = functools.partial(_outer, blocks=blocks._replace(tile=tile), rank=rank, columns=d_in)
    return pl.pallas_call(
        kernel,
        grid=(slots, pl.cdiv(d_in, blocks.block)),
        out_shape=jax.ShapeDtypeStruct((slots, rank, d_in), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        cost_estimate=_cost(2 * rows * rank * d_in, (h_RxM, x_MxD), slots * rank * d_in, x_MxD),
        name=name,
        interpret=interpret,
    )(first_S, end_S, row_M, scale_S.astype(jnp.float32), h_RxM, x_MxD)


def _cost(flops: int, streamed, adapter_entries: int, factor) -> pl.CostEstimate:
    """Rows once, adapters once a row at most: never a function of the number of slots in the pool."""
    moved = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(streamed))
    return pl.CostEstimate(
        flops=flops, bytes_accessed=moved + adapter_entries * factor.dtype.itemsize, transcendentals=0
    )


def _ranks(rank_S: jax.Array | None, factor_SxRxD: jax.Array) -> jax.Array:
    slots, rank = factor_SxRxD.shape[:2]
    return jnp.full((slots,), rank, jnp.int32) if rank_S is None else rank_S.astype(jnp.int32)


def _padded_rank(rank: int, tile: int) -> int:
    least = 1 if tile == 1 else MIN_DOT
    return max(least, pl.next_power_of_2(rank))


def _stretch(first, end, row, tile: int):
    """(places in the order, which of them are the tile's, the rows they stand for)."""
    place_t = first + jnp.arange(tile, dtype=jnp.int32)
    mine_t = place_t < end
    # Not 0 for the others: the interpreter writes a masked place's old value back, and row 0 may be somebody's.
    return place_t, mine_t, plgpu.load(row.at[place_t], mask=mine_t, other=row.shape[0])


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    """left @ right in float32; a single row is a sum on the plain units, not a sixteenth of a tensor core's tile."""
    if left.shape[0] == 1:
        wide = left.astype(jnp.float32).reshape(-1, 1) * right.astype(jnp.float32)
        return jnp.sum(wide, axis=0).reshape(1, -1)
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return plgpu.dot(left, right, precision=precision) if precision else plgpu.dot(left, right)


def _shrink(slot, first, end, row, ranks, x, a, h, *, blocks: Blocks, rank: int, columns: int):
    program, tile, width = pl.program_id(0), blocks.tile, _padded_rank(rank, blocks.tile)
    place_t, mine_t, row_t = _stretch(first[program], end[program], row, tile)
    owner = slot[program]
    own = jnp.maximum(owner, 0)
    rank_r = jnp.arange(width, dtype=jnp.int32)
    live_r = (rank_r < ranks[own]) & (owner >= 0)

    def step(index, acc_txr):
        column_d = index * blocks.block + jnp.arange(blocks.block, dtype=jnp.int32)
        inside_d = column_d < columns
        x_txd = plgpu.load(x.at[row_t[:, None], column_d[None, :]], mask=mine_t[:, None] & inside_d[None, :], other=0.0)
        a_dxr = plgpu.load(
            a.at[own, rank_r[None, :], column_d[:, None]], mask=inside_d[:, None] & live_r[None, :], other=0.0
        )
        return acc_txr + _product(x_txd, a_dxr.astype(x_txd.dtype))

    steps = jnp.where((owner >= 0) & (end[program] > first[program]), pl.cdiv(columns, blocks.block), 0)
    acc_txr = jax.lax.fori_loop(0, steps, step, jnp.zeros((tile, width), jnp.float32))
    stored = mine_t[:, None] & (rank_r < rank)[None, :]
    plgpu.store(h.at[rank_r[None, :], place_t[:, None]], acc_txr.astype(h.dtype), mask=stored)


def _expand(slot, first, end, row, ranks, scale, h, b, *rest, blocks: Blocks, rank: int, columns: int, has_y: bool):
    out = rest[-1]
    program, tile, width = pl.program_id(0), blocks.tile, _padded_rank(rank, blocks.tile)
    place_t, mine_t, row_t = _stretch(first[program], end[program], row, tile)
    owner = slot[program]
    own = jnp.maximum(owner, 0)
    rank_r = jnp.arange(width, dtype=jnp.int32)
    live_r = (rank_r < ranks[own]) & (owner >= 0)
    column_f = pl.program_id(1) * blocks.block + jnp.arange(blocks.block, dtype=jnp.int32)
    inside_f = column_f < columns
    stored = mine_t[:, None] & inside_f[None, :]
    h_txr = plgpu.load(h.at[rank_r[None, :], place_t[:, None]], mask=mine_t[:, None] & live_r[None, :], other=0.0)
    b_rxf = plgpu.load(
        b.at[own, rank_r[:, None], column_f[None, :]], mask=live_r[:, None] & inside_f[None, :], other=0.0
    )
    scaled_txr = (h_txr.astype(jnp.float32) * scale[own]).astype(h_txr.dtype)
    delta_txf = _product(scaled_txr, b_rxf.astype(h_txr.dtype))
    if not has_y:
        plgpu.store(out.at[row_t[:, None], column_f[None, :]], delta_txf.astype(out.dtype), mask=stored)
        return
    y_txf = plgpu.load(rest[0].at[row_t[:, None], column_f[None, :]], mask=stored, other=0.0)
    sum_txf = (y_txf.astype(jnp.float32) + delta_txf).astype(out.dtype)
    # y's own bytes, and not y + 0, which would turn -0 into +0.
    plgpu.store(out.at[row_t[:, None], column_f[None, :]], jnp.where(owner >= 0, sum_txf, y_txf), mask=stored)


def _outer(first, end, row, scale, h, x, out, *, blocks: Blocks, rank: int, columns: int):
    owner, width, tile = pl.program_id(0), _padded_rank(rank, blocks.tile), blocks.tile
    rank_r = jnp.arange(width, dtype=jnp.int32)
    column_d = pl.program_id(1) * blocks.block + jnp.arange(blocks.block, dtype=jnp.int32)
    inside_d, real_r = column_d < columns, rank_r < rank
    begin, stop = first[owner], end[owner]

    def step(index, acc_rxd):
        place_t, mine_t, row_t = _stretch(begin + index * tile, stop, row, tile)
        h_rxt = plgpu.load(h.at[rank_r[:, None], place_t[None, :]], mask=real_r[:, None] & mine_t[None, :], other=0.0)
        x_txd = plgpu.load(x.at[row_t[:, None], column_d[None, :]], mask=mine_t[:, None] & inside_d[None, :], other=0.0)
        return acc_rxd + _product(h_rxt, x_txd.astype(h_rxt.dtype))

    steps = (stop - begin + tile - 1) // tile
    acc_rxd = jax.lax.fori_loop(0, steps, step, jnp.zeros((width, blocks.block), jnp.float32))
    # An empty slot's zeros must not meet its scale, which may be anything.
    scaled_rxd = jnp.where(stop > begin, acc_rxd * scale[owner], 0.0)
    stored = real_r[:, None] & inside_d[None, :]
    plgpu.store(out.at[owner, rank_r[:, None], column_d[None, :]], scaled_rxd.astype(out.dtype), mask=stored)
