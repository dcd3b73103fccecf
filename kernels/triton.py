"""Grouped products in Pallas-Triton, from which every op's GPU form is composed: shrink, expand, outer, outer_shrink.

A tile is a stretch of rows of a flat [M, D] array that belong to one slot, so that nothing is sorted, gathered or
padded in memory. A row of a factor is read once a tile, in the tile's own rank; slot -1 reads and multiplies nothing.
h is [R, M] in the rows' own order.

Triton wants powers of two: ranks and columns beyond the real ones are masked, not stored.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from popax.kernels.rows import nobody, places, search, starts

MIN_DOT = 16  # the least extent of a tensor core's operand


class Tiles(NamedTuple):
    """P tiles, rows [first, end) each, in order. slot_P: -1 where they have no adapter. A tile may be empty."""

    slot_P: jax.Array
    first_P: jax.Array
    end_P: jax.Array


class Runs(NamedTuple):
    """V stretches of rows of one slot, in order of their slots: slot s owns the runs [begin_s, stop_s)."""

    first_V: jax.Array
    end_V: jax.Array
    begin_S: jax.Array
    stop_S: jax.Array


class Blocks(NamedTuple):
    """tile: rows a program, 1 (products on the plain units) or a power of two >= 16. block: columns a step.

    split: programs that share a tile's columns in `shrink`, whose parts are then added. joint: columns of a program of
    `outer_shrink`, a power of two >= 16; 0 where two passes, each reading the rows, do its work.
    """

    tile: int = 64
    block: int = 64
    warps: int = 4
    stages: int = 3
    split: int = 1
    joint: int = 0


def stacked_tiles(users: int, tokens: int, tile: int) -> Tiles:
    """Every user has `tokens` consecutive rows."""
    per_user = pl.cdiv(tokens, tile)
    user_P = jnp.repeat(jnp.arange(users, dtype=jnp.int32), per_user)
    inside_P = jnp.tile(jnp.arange(per_user, dtype=jnp.int32) * tile, users)
    return Tiles(user_P, user_P * tokens + inside_P, user_P * tokens + jnp.minimum(inside_P + tile, tokens))


def stacked_runs(users: int, tokens: int) -> Runs:
    user_N = jnp.arange(users, dtype=jnp.int32)
    return Runs(user_N * tokens, (user_N + 1) * tokens, user_N, user_N + 1)


def run_tiles(slot_M: jax.Array, slots: int, tile: int, most_runs: int) -> Tiles:
    """Tiles of rows with a slot each, in any order; a slot outside [0, S) is no adapter.

    most_runs: a bound on the runs of equal slots. The arrays have min(M, ceil(M / tile) + most_runs) tiles; those
    beyond the needed ones are empty.
    """
    rows, key_M = slot_M.shape[0], nobody(slot_M, slots)
    begins_M = starts(key_M) | (jnp.arange(rows, dtype=jnp.int32) % tile == 0)
    first_P = places(begins_M, min(rows, pl.cdiv(rows, tile) + most_runs))
    key_P = jnp.where(first_P < rows, key_M[jnp.minimum(first_P, rows - 1)], slots)
    return Tiles(jnp.where(key_P == slots, -1, key_P), first_P, _next(first_P, rows))


def sorted_runs(slot_M: jax.Array, slots: int, most_runs: int) -> Runs:
    """The runs of equal slots; those of rows without an adapter, and empty ones, belong to nobody."""
    rows, key_M = slot_M.shape[0], nobody(slot_M, slots)
    first_V = places(starts(key_M), min(rows, most_runs))
    key_V = jnp.where(first_V < rows, key_M[jnp.minimum(first_V, rows - 1)], slots)
    order_V = jnp.argsort(key_V, stable=True)
    sorted_V, slot_S = key_V[order_V], jnp.arange(slots, dtype=jnp.int32)
    bounds = (search(sorted_V, slot_S, side=side) for side in ("left", "right"))
    return Runs(first_V[order_V], _next(first_V, rows)[order_V], *bounds)


def _next(first_P: jax.Array, rows: int) -> jax.Array:
    return jnp.concatenate([first_P[1:], jnp.full((1,), rows, jnp.int32)])


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
    """h[:, m] = A[slot] x_m: [R, M] in x's dtype; zeros without an adapter and beyond a rank."""
    (rows, d_in), rank = x_MxD.shape, a_SxRxD.shape[1]
    dtype = x_MxD.dtype if blocks.split == 1 else jnp.float32
    h_KxRxM = pl.pallas_call(
        named(name, _shrink, blocks=blocks, rank=rank, columns=d_in),
        grid=(tiles.slot_P.shape[0], blocks.split),
        out_shape=jax.ShapeDtypeStruct((blocks.split, rank, rows), dtype),
        compiler_params=parameters(blocks),
        cost_estimate=_cost(2 * rows * rank * d_in, x_MxD, rows * rank * d_in, a_SxRxD),
        name=name,
        interpret=interpret,
    )(*tiles, ranks(rank_S, a_SxRxD), x_MxD, a_SxRxD)
    return h_KxRxM[0] if blocks.split == 1 else jnp.sum(h_KxRxM, axis=0).astype(x_MxD.dtype)


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
    """out_m = y_m + s B[slot]^T h[:, m]: [M, F] in y's dtype, else h's. y's very bytes without an adapter."""
    (rank, rows), d_out = h_RxM.shape, b_SxRxF.shape[2]
    dtype = h_RxM.dtype if y_MxF is None else y_MxF.dtype
    return pl.pallas_call(
        named(name, _expand, blocks=blocks, rank=rank, columns=d_out, has_y=y_MxF is not None),
        grid=(tiles.slot_P.shape[0], pl.cdiv(d_out, blocks.block)),
        out_shape=jax.ShapeDtypeStruct((rows, d_out), dtype),
        compiler_params=parameters(blocks),
        cost_estimate=_cost(2 * rows * rank * d_out, (h_RxM, y_MxF), rows * rank * d_out, b_SxRxF),
        name=name,
        interpret=interpret,
    )(
        *tiles,
        ranks(rank_S, b_SxRxF),
        scale_S.astype(jnp.float32),
        h_RxM,
        b_SxRxF,
        *(() if y_MxF is None else (y_MxF,)),
    )


def outer(
    h_RxM: jax.Array,
    x_MxD: jax.Array,
    runs: Runs,
    rank_S: jax.Array,
    scale_S: jax.Array,
    blocks: Blocks,
    *,
    dtype,
    name: str,
    interpret=False,
) -> jax.Array:
    """g[s] = scale_s sum over the slot's rows of h[:, m] x_m^T: [S, R, D]; exact zeros for an empty slot."""
    (rank, rows), d_in, slots = h_RxM.shape, x_MxD.shape[1], scale_S.shape[0]
    shape = jax.ShapeDtypeStruct((slots, rank, d_in), dtype)
    return pl.pallas_call(
        named(name, _outer, tile=max(blocks.tile, MIN_DOT), block=blocks.block, rank=rank, columns=d_in),
        grid=(slots, pl.cdiv(d_in, blocks.block)),
        out_shape=shape,
        compiler_params=parameters(blocks),
        cost_estimate=_cost(2 * rows * rank * d_in, (h_RxM, x_MxD), min(slots, rows) * rank * d_in, shape),
        name=name,
        interpret=interpret,
    )(*runs, rank_S, scale_S.astype(jnp.float32), h_RxM, x_MxD)


def outer_shrink(
    h_RxM: jax.Array,
    g_MxF: jax.Array,
    b_SxRxF: jax.Array,
    runs: Runs,
    rank_S: jax.Array,
    scale_S: jax.Array,
    blocks: Blocks,
    *,
    name: str,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """(`outer` of h and g in b's dtype, `shrink` of g with b), and g is read once.

    Rows without an adapter are not written in the second. A program has blocks.joint columns; what it knows of the
    second, in g's dtype, is added afterwards.
    """
    (rank, rows), (slots, _, d_out) = h_RxM.shape, b_SxRxF.shape
    parts = pl.cdiv(d_out, blocks.joint)
    tile = max(min(blocks.tile, 2 * MIN_DOT), MIN_DOT)  # g's tile, B's block and the sum share the registers
    db_SxRxF, gb_KxRxM = pl.pallas_call(
        named(name, _outer_shrink, tile=tile, block=blocks.joint, rank=rank, columns=d_out),
        grid=(slots, parts),
        out_shape=(
            jax.ShapeDtypeStruct(b_SxRxF.shape, b_SxRxF.dtype),
            jax.ShapeDtypeStruct((parts, rank, rows), g_MxF.dtype),
        ),
        compiler_params=parameters(blocks),
        cost_estimate=_cost(4 * rows * rank * d_out, (h_RxM, g_MxF), 2 * min(slots, rows) * rank * d_out, b_SxRxF),
        name=name,
        interpret=interpret,
    )(*runs, rank_S, scale_S.astype(jnp.float32), h_RxM, g_MxF, b_SxRxF)
    return db_SxRxF, jnp.sum(gb_KxRxM.astype(jnp.float32), axis=0).astype(g_MxF.dtype)


def parameters(blocks) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)


def named(name: str, kernel, **options):
    """kernel(*refs, **options) under a name of its own: a profile names a Triton kernel by its function."""

    def call(*refs):
        return kernel(*refs, **options)

    call.__name__ = call.__qualname__ = name
    return call


def _cost(flops: int, streamed, adapter_entries: int, factor) -> pl.CostEstimate:
    """Rows once, adapters once a row at most: never a function of the number of slots in the pool."""
    moved = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(streamed))
    return pl.CostEstimate(
        flops=flops, bytes_accessed=moved + adapter_entries * factor.dtype.itemsize, transcendentals=0
    )


def ranks(rank_S: jax.Array | None, factor_SxRxD: jax.Array) -> jax.Array:
    slots, rank = factor_SxRxD.shape[:2]
    return jnp.full((slots,), rank, jnp.int32) if rank_S is None else rank_S.astype(jnp.int32)


def padded_rank(rank: int, tile: int) -> int:
    least = 1 if tile == 1 else MIN_DOT
    return max(least, pl.next_power_of_2(rank))


def _stretch(first, end, tile: int, rows: int):
    """(the tile's rows, which of them are real)."""
    row_t = first + jnp.arange(tile, dtype=jnp.int32)
    mine_t = row_t < end
    # `rows` for the others: the interpreter writes a masked place's old value back, and it may be somebody's.
    return jnp.where(mine_t, row_t, rows), mine_t


def product(left: jax.Array, right: jax.Array, *, trans_b: bool = False) -> jax.Array:
    """left @ right in float32; a single row is a sum on the plain units, not a sixteenth of a tensor core's tile."""
    if left.shape[0] == 1 and not trans_b:
        wide = left.astype(jnp.float32).reshape(-1, 1) * right.astype(jnp.float32)
        return jnp.sum(wide, axis=0).reshape(1, -1)
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return plgpu.dot(left, right, trans_b=trans_b, precision=precision)


def _shrink(slot, first, end, ranks, x, a, h, *, blocks: Blocks, rank: int, columns: int):
    program, part, tile, width = pl.program_id(0), pl.program_id(1), blocks.tile, padded_rank(rank, blocks.tile)
    row_t, mine_t = _stretch(first[program], end[program], tile, x.shape[0])
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
        return acc_txr + product(x_txd, a_dxr.astype(x_txd.dtype))

    steps = pl.cdiv(columns, blocks.block)
    share = pl.cdiv(steps, blocks.split)
    begin = part * share
    stop = jnp.where((owner >= 0) & (end[program] > first[program]), jnp.minimum(begin + share, steps), begin)
    acc_txr = jax.lax.fori_loop(begin, stop, step, jnp.zeros((tile, width), jnp.float32))
    stored = mine_t[:, None] & (rank_r < rank)[None, :]
    plgpu.store(h.at[part, rank_r[None, :], row_t[:, None]], acc_txr.astype(h.dtype), mask=stored)


def _expand(slot, first, end, ranks, scale, h, b, *rest, blocks: Blocks, rank: int, columns: int, has_y: bool):
    out = rest[-1]
    program, tile, width = pl.program_id(0), blocks.tile, padded_rank(rank, blocks.tile)
    row_t, mine_t = _stretch(first[program], end[program], tile, h.shape[1])
    owner = slot[program]
    own = jnp.maximum(owner, 0)
    rank_r = jnp.arange(width, dtype=jnp.int32)
    live_r = (rank_r < ranks[own]) & (owner >= 0)
    column_f = pl.program_id(1) * blocks.block + jnp.arange(blocks.block, dtype=jnp.int32)
    inside_f = column_f < columns
    stored = mine_t[:, None] & inside_f[None, :]
    h_txr = plgpu.load(h.at[rank_r[None, :], row_t[:, None]], mask=mine_t[:, None] & live_r[None, :], other=0.0)
    b_rxf = plgpu.load(
        b.at[own, rank_r[:, None], column_f[None, :]], mask=live_r[:, None] & inside_f[None, :], other=0.0
    )
    scaled_txr = (h_txr.astype(jnp.float32) * scale[own]).astype(h_txr.dtype)
    # A rank of none leaves nothing to multiply, and the scale may be anything.
    scaled_txr = jnp.where(live_r[None, :], scaled_txr, jnp.zeros_like(scaled_txr))
    delta_txf = product(scaled_txr, b_rxf.astype(h_txr.dtype))
    if not has_y:
        plgpu.store(out.at[row_t[:, None], column_f[None, :]], delta_txf.astype(out.dtype), mask=stored)
        return
    y_txf = plgpu.load(rest[0].at[row_t[:, None], column_f[None, :]], mask=stored, other=0.0)
    sum_txf = (y_txf.astype(jnp.float32) + delta_txf).astype(out.dtype)
    # y's own bytes, and not y + 0, which would turn -0 into +0.
    plgpu.store(out.at[row_t[:, None], column_f[None, :]], jnp.where(owner >= 0, sum_txf, y_txf), mask=stored)


def _over_runs(runs: Runs, owner, tile: int, rows: int, step, carry):
    """step(row_t, mine_t, carry) over the tiles of the slot's runs, one after the other."""

    def walk(run, carry):
        first, end = runs.first_V[run], runs.end_V[run]

        def one(index, carry):
            return step(*_stretch(first + index * tile, end, tile, rows), carry)

        return jax.lax.fori_loop(0, (end - first + tile - 1) // tile, one, carry)

    return jax.lax.fori_loop(runs.begin_S[owner], runs.stop_S[owner], walk, carry)


def _outer(*refs, tile: int, block: int, rank: int, columns: int):
    runs, (ranks, scale, h, x, out) = Runs(*refs[: len(Runs._fields)]), refs[len(Runs._fields) :]
    owner, width = pl.program_id(0), padded_rank(rank, tile)
    rank_r = jnp.arange(width, dtype=jnp.int32)
    column_d = pl.program_id(1) * block + jnp.arange(block, dtype=jnp.int32)
    inside_d, live_r = column_d < columns, rank_r < ranks[owner]

    def step(row_t, mine_t, acc_rxd):
        h_rxt = plgpu.load(h.at[rank_r[:, None], row_t[None, :]], mask=live_r[:, None] & mine_t[None, :], other=0.0)
        x_txd = plgpu.load(x.at[row_t[:, None], column_d[None, :]], mask=mine_t[:, None] & inside_d[None, :], other=0.0)
        return acc_rxd + product(h_rxt, x_txd.astype(h_rxt.dtype))

    acc_rxd = _over_runs(runs, owner, tile, x.shape[0], step, jnp.zeros((width, block), jnp.float32))
    _store_factor(out, runs, owner, acc_rxd, scale, live_r, rank_r, column_d, rank)


def _outer_shrink(*refs, tile: int, block: int, rank: int, columns: int):
    runs, (ranks, scale, h, g, b, out, gb) = Runs(*refs[: len(Runs._fields)]), refs[len(Runs._fields) :]
    owner, part, width = pl.program_id(0), pl.program_id(1), padded_rank(rank, tile)
    rank_r = jnp.arange(width, dtype=jnp.int32)
    column_f = part * block + jnp.arange(block, dtype=jnp.int32)
    inside_f, live_r = column_f < columns, rank_r < ranks[owner]
    used_rxf = live_r[:, None] & inside_f[None, :] & (runs.stop_S[owner] > runs.begin_S[owner])
    b_rxf = plgpu.load(b.at[owner, rank_r[:, None], column_f[None, :]], mask=used_rxf, other=0.0).astype(g.dtype)

    def step(row_t, mine_t, acc_rxf):
        h_rxt = plgpu.load(h.at[rank_r[:, None], row_t[None, :]], mask=live_r[:, None] & mine_t[None, :], other=0.0)
        g_txf = plgpu.load(g.at[row_t[:, None], column_f[None, :]], mask=mine_t[:, None] & inside_f[None, :], other=0.0)
        gb_rxt = product(b_rxf, g_txf, trans_b=True)
        stored = (rank_r < rank)[:, None] & mine_t[None, :]
        plgpu.store(gb.at[part, rank_r[:, None], row_t[None, :]], gb_rxt.astype(gb.dtype), mask=stored)
        return acc_rxf + product(h_rxt, g_txf.astype(h_rxt.dtype))

    acc_rxf = _over_runs(runs, owner, tile, g.shape[0], step, jnp.zeros((width, block), jnp.float32))
    _store_factor(out, runs, owner, acc_rxf, scale, live_r, rank_r, column_f, rank)


def _store_factor(out, runs: Runs, owner, acc_rxd, scale, live_r, rank_r, column_d, rank: int):
    """scale x the sum; zeros beyond the slot's rank and for an empty slot, whose scale may be anything."""
    live_rx1 = live_r[:, None] & (runs.stop_S[owner] > runs.begin_S[owner])
    scaled_rxd = jnp.where(live_rx1, acc_rxd * scale[owner], 0.0)
    stored = (rank_r < rank)[:, None] & (column_d < out.shape[2])[None, :]
    plgpu.store(out.at[owner, rank_r[:, None], column_d[None, :]], scaled_rxd.astype(out.dtype), mask=stored)
