"""Rows of many slots on TPU, forward and backward: whole tiles on the matrix unit, masked to each slot's rows.

Three products walk the units of `groups`: shrink (h = A x), expand (y + s B^T h) and outer (sum of h x^T by slot). An
adapter block is fetched when the unit changes slot or chunk, a row tile when it changes tile. The pool's other slots
are never touched: grids end at the number of units in use.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from popax.kernels.indexed_lora import groups
from popax.kernels.indexed_lora.groups import Units
from popax.kernels.rows import nobody, segment_sums
from popax.kernels.tpu import LANES, cdiv, check_dtypes, compiler_params, divisor_block, dot, vmem_budget


class Blocks(NamedTuple):
    """tile: rows; columns: of the row arrays a step; rank: rows of a factor a unit."""

    tile: int
    columns: int
    rank: int


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

    Work: runs of equal slots x tile x the rank's chunks, so rows should come in runs (sequences of one user, or
    sorted). most_runs: a bound on their number, else that of the rows. Raises NotImplementedError for rank 1, D or
    dtypes that it does not take, and where blocks do not fit.
    """
    rows, rank = x_MxD.shape[0], a_SxRxD.shape[1]
    _check(x_MxD, a_SxRxD, b_SxRxF, y_MxF)
    blocks = blocks or default_blocks(rows, max(x_MxD.shape[1], b_SxRxF.shape[2]), rank)
    units = _units(slot_M, rank_S, rank, blocks, most_runs)
    h_RxM = _shrink(units, x_MxD, a_SxRxD, blocks, interpret)
    dtype = x_MxD.dtype if y_MxF is None else y_MxF.dtype
    return _expand(units, h_RxM, b_SxRxF, scale_S, y_MxF, dtype, blocks, interpret), h_RxM


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
    rows, rank, slots = x_MxD.shape[0], a_SxRxD.shape[1], a_SxRxD.shape[0]
    _check(g_MxF, x_MxD, a_SxRxD, b_SxRxF)
    blocks = blocks or default_blocks(rows, max(x_MxD.shape[1], b_SxRxF.shape[2]), rank)
    units = _units(slot_M, rank_S, rank, blocks, most_runs)
    g_MxF = g_MxF.astype(x_MxD.dtype)
    gb_RxM = _shrink(units, g_MxF, b_SxRxF, blocks, interpret)
    dx_MxD = _expand(units, gb_RxM, a_SxRxD, scale_S, None, x_MxD.dtype, blocks, interpret)
    owned = groups.by_slot(units, cdiv(rank, blocks.rank))
    da_SxRxD = _outer(owned, gb_RxM, x_MxD, scale_S, a_SxRxD, blocks, interpret)
    db_SxRxF = _outer(owned, h_RxM, g_MxF, scale_S, b_SxRxF, blocks, interpret)
    key_M = nobody(slot_M, slots)
    live_RxM = jnp.arange(rank)[:, None] < groups.rank_of_rows(units, rows)[None]
    # Where no unit came by, h holds anything.
    products_RxM = jnp.where(live_RxM, gb_RxM.astype(jnp.float32) * h_RxM.astype(jnp.float32), 0.0)
    ds_S = segment_sums(jnp.sum(products_RxM, axis=0), key_M, slots)
    return dx_MxD, da_SxRxD, db_SxRxF, ds_S.astype(scale_S.dtype)


def _units(slot_M, rank_S, rank: int, blocks: Blocks, most_runs: int | None) -> Units:
    runs = slot_M.shape[0] if most_runs is None else most_runs
    chunks = cdiv(rank, blocks.rank)
    return groups.by_tile(slot_M, rank_S, tile=blocks.tile, rank_block=blocks.rank, chunks=chunks, most_runs=runs)


def _shrink(units: Units, x_MxD, a_SxRxD, blocks: Blocks, interpret) -> jax.Array:
    (rows, d_in), rank = x_MxD.shape, a_SxRxD.shape[1]
    width = divisor_block(d_in, blocks.columns)
    steps = d_in // width
    return pl.pallas_call(
        functools.partial(_shrink_kernel, blocks=blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(units),
            grid=(units.count[0], steps),
            in_specs=[
                pl.BlockSpec((blocks.tile, width), lambda u, k, _, tile, *rest: (tile[u], k)),
                pl.BlockSpec(
                    (None, blocks.rank, width), lambda u, k, _, tile, slot, chunk, *rest: (slot[u], chunk[u], k)
                ),
            ],
            out_specs=pl.BlockSpec(
                (blocks.rank, blocks.tile), lambda u, k, _, tile, slot, chunk, *rest: (chunk[u], tile[u])
            ),
            scratch_shapes=[pltpu.VMEM((blocks.tile, blocks.rank), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((rank, rows), x_MxD.dtype),
        compiler_params=compiler_params(("arbitrary", "arbitrary")),
        cost_estimate=_cost(units, blocks, rank, d_in, x_MxD, a_SxRxD),
        name="popax_indexed_lora_shrink",
        interpret=interpret,
    )(*units, x_MxD, a_SxRxD)


def _shrink_kernel(*refs, blocks: Blocks):
    units, (x, a, h, acc_txr) = Units(*refs[: len(Units._fields)]), refs[len(Units._fields) :]
    unit, step = pl.program_id(0), pl.program_id(1)

    @pl.when(step == 0)
    def _():
        acc_txr[...] = jnp.zeros_like(acc_txr)

    acc_txr[...] += dot(x[...], a[...].astype(x.dtype), ((1,), (1,)))

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        mine_rxt = _mine(units, unit, blocks, (blocks.rank, blocks.tile), row_axis=1)
        fresh = _changes(unit, units.tile_U, units.chunk_U)
        old_rxt = jnp.where(fresh, jnp.zeros_like(h), h[...])
        h[...] = jnp.where(mine_rxt, acc_txr[...].T.astype(h.dtype), old_rxt)


def _expand(units: Units, h_RxM, b_SxRxF, scale_S, y_MxF, dtype, blocks: Blocks, interpret) -> jax.Array:
    rows, (_, rank, d_out) = h_RxM.shape[1], b_SxRxF.shape
    width = divisor_block(d_out, blocks.columns)
    out_spec = pl.BlockSpec((blocks.tile, width), lambda k, u, _, tile, *rest: (tile[u], k))
    operands = [h_RxM, b_SxRxF] + ([] if y_MxF is None else [y_MxF])
    in_specs = [
        pl.BlockSpec((blocks.rank, blocks.tile), lambda k, u, _, tile, slot, chunk, *rest: (chunk[u], tile[u])),
        pl.BlockSpec((None, blocks.rank, width), lambda k, u, _, tile, slot, chunk, *rest: (slot[u], chunk[u], k)),
    ] + ([] if y_MxF is None else [out_spec])
    return pl.pallas_call(
        functools.partial(_expand_kernel, blocks=blocks, has_y=y_MxF is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(units) + 1,
            grid=(d_out // width, units.count[0]),
            in_specs=in_specs,
            out_specs=out_spec,
            scratch_shapes=[pltpu.VMEM((blocks.tile, width), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, d_out), dtype),
        input_output_aliases={} if y_MxF is None else {len(units) + 3: 0},
        compiler_params=compiler_params(("arbitrary", "arbitrary")),
        cost_estimate=_cost(
            units, blocks, rank, d_out, (h_RxM, y_MxF, jax.ShapeDtypeStruct((rows, d_out), dtype)), b_SxRxF
        ),
        name="popax_indexed_lora_expand",
        interpret=interpret,
    )(*units, scale_S.astype(jnp.float32), *operands)


def _expand_kernel(*refs, blocks: Blocks, has_y: bool):
    units, (scale, h, b, *rest) = Units(*refs[: len(Units._fields)]), refs[len(Units._fields) :]
    y, (out, acc_txf) = (rest[0], rest[1:]) if has_y else (None, rest)
    unit = pl.program_id(1)

    @pl.when(_changes(unit, units.tile_U))
    def _():
        acc_txf[...] = jnp.zeros_like(acc_txf) if y is None else y[...].astype(jnp.float32)

    mine_rxt = _mine(units, unit, blocks, (blocks.rank, blocks.tile), row_axis=1)
    live_rxf = _live(units, unit, blocks, b.shape)
    scaled_rxt = (h[...].astype(jnp.float32) * scale[units.slot_U[unit]]).astype(h.dtype)
    h_rxt = jnp.where(mine_rxt, scaled_rxt, jnp.zeros_like(scaled_rxt))
    b_rxf = jnp.where(live_rxf, b[...], jnp.zeros_like(b)).astype(h.dtype)
    delta_txf = dot(h_rxt, b_rxf, ((0,), (0,)))
    # Only the unit's own rows: a NaN of this slot times another row's zero would be NaN.
    own_txf = _mine(units, unit, blocks, delta_txf.shape, row_axis=0, ranks=False)
    acc_txf[...] = jnp.where(own_txf, acc_txf[...] + delta_txf, acc_txf[...])
    out[...] = acc_txf[...].astype(out.dtype)


def _outer(units: Units, h_RxM, x_MxD, scale_S, factor_SxRxD, blocks: Blocks, interpret) -> jax.Array:
    d_in, rank = x_MxD.shape[1], h_RxM.shape[0]
    width = divisor_block(d_in, blocks.columns)
    out_spec = pl.BlockSpec(
        (None, blocks.rank, width), lambda k, u, _, tile, slot, chunk, *rest: (slot[u], chunk[u], k)
    )
    return pl.pallas_call(
        functools.partial(_outer_kernel, blocks=blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(units) + 1,
            grid=(d_in // width, units.count[0]),
            in_specs=[
                pl.BlockSpec((blocks.rank, blocks.tile), lambda k, u, _, tile, slot, chunk, *rest: (chunk[u], tile[u])),
                pl.BlockSpec((blocks.tile, width), lambda k, u, _, tile, *rest: (tile[u], k)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=out_spec,
            scratch_shapes=[pltpu.VMEM((blocks.rank, width), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(factor_SxRxD.shape, factor_SxRxD.dtype),
        # Zeros for the slots that no unit comes by; the kernel does not walk them.
        input_output_aliases={len(units) + 3: 0},
        compiler_params=compiler_params(("arbitrary", "arbitrary")),
        cost_estimate=_cost(units, blocks, rank, d_in, (h_RxM, x_MxD), factor_SxRxD),
        name="popax_indexed_lora_outer",
        interpret=interpret,
    )(*units, scale_S.astype(jnp.float32), h_RxM, x_MxD, jnp.zeros(factor_SxRxD.shape, factor_SxRxD.dtype))


def _outer_kernel(*refs, blocks: Blocks):
    units, (scale, h, x, zeros, out, acc_rxd) = Units(*refs[: len(Units._fields)]), refs[len(Units._fields) :]
    del zeros
    unit = pl.program_id(1)

    @pl.when(_changes(unit, units.slot_U, units.chunk_U))
    def _():
        acc_rxd[...] = jnp.zeros_like(acc_rxd)

    h_rxt = jnp.where(_mine(units, unit, blocks, (blocks.rank, blocks.tile), row_axis=1), h[...], jnp.zeros_like(h))
    own_txd = _mine(units, unit, blocks, x.shape, row_axis=0, ranks=False)
    x_txd = jnp.where(own_txd, x[...], jnp.zeros_like(x)).astype(h.dtype)
    acc_rxd[...] += dot(h_rxt, x_txd, ((1,), (0,)))
    scaled_rxd = acc_rxd[...] * scale[units.slot_U[unit]]
    used = units.end_U[unit] > units.first_U[unit]
    live_rxd = _live(units, unit, blocks, out.shape) & used
    out[...] = jnp.where(live_rxd, scaled_rxd, 0.0).astype(out.dtype)


def _changes(unit, *fields) -> jax.Array:
    """Whether any of the fields differs from the previous unit's; true for the first one."""
    before = jnp.maximum(unit - 1, 0)
    changed = unit == 0
    for field in fields:
        changed = changed | (field[unit] != field[before])
    return changed


def _mine(units: Units, unit, blocks: Blocks, shape, *, row_axis: int, ranks: bool = True) -> jax.Array:
    """Which entries are of the unit's rows, and of ranks that its slot has."""
    row = units.tile_U[unit] * blocks.tile + jax.lax.broadcasted_iota(jnp.int32, shape, row_axis)
    mine = (row >= units.first_U[unit]) & (row < units.end_U[unit])
    return mine & _live(units, unit, blocks, shape) if ranks else mine


def _live(units: Units, unit, blocks: Blocks, shape) -> jax.Array:
    rank = units.chunk_U[unit] * blocks.rank + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return rank < units.rank_U[unit]


def _cost(units: Units, blocks: Blocks, rank: int, columns: int, streamed, factor) -> pl.CostEstimate:
    """Rows once; a chunk of an adapter's rows once for each unit that there may be: never a function of the slots."""
    moved = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(streamed))
    adapters = units.slot_U.shape[0] * blocks.rank * columns * factor.dtype.itemsize
    rows = max(leaf.shape[0] for leaf in jax.tree.leaves(streamed))
    return pl.CostEstimate(flops=2 * rows * rank * columns, bytes_accessed=moved + adapters, transcendentals=0)


def default_blocks(rows: int, columns: int, rank: int, ranks_differ: bool = False) -> Blocks:
    """The tallest tile and widest columns that fit. One chunk for the whole rank, chunks of 16 where ranks differ."""
    rank_block = 16 if ranks_differ and rank % 16 == 0 else rank
    for tile in (512, 256, 128):
        tile = min(tile, rows)
        for most in (4096, 2048, 1024, 512, 256, 128):
            width = divisor_block(columns, most)
            held = 2 * (tile + max(rank_block, 16)) * width * 8 + tile * width * 4 + 4 * tile * LANES * 4
            if held <= vmem_budget():
                return Blocks(tile, most, rank_block)
    raise NotImplementedError(f"{rows} rows of {columns} columns at rank {rank} do not fit {vmem_budget()} bytes")


def _check(x_MxD, *others) -> None:
    check_dtypes(x_MxD, *others)
    if others[-2].ndim == 3 and others[-2].shape[1] == 1:
        raise NotImplementedError("rank 1: the compiler has no single-row operands")
