"""The stacked op on TPU: forward and backward in one launch each, every activation read once and written once.

A launch walks (user, token tile, step). Its steps are two phases over column blocks: the first reduces over one side's
columns into a [tile, R] product that stays in VMEM, the second expands it over the other side's. A block whose index
does not change from one step to the next is not fetched again, so the phase that does not use an operand keeps its
index still.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from popax.kernels.tpu import (
    LANES,
    cdiv,
    check_dtypes,
    compiler_params,
    divisor_block,
    dot,
    phases,
    two_rows,
    vmem_budget,
)


class Blocks(NamedTuple):
    """tile: tokens; d_in, d_out: columns a step."""

    tile: int
    d_in: int
    d_out: int


def forward(
    x_NxTxD: jax.Array,
    a_NxRxD: jax.Array,
    b_NxRxF: jax.Array,
    scale_N: jax.Array,
    y_NxTxF: jax.Array | None = None,
    *,
    blocks: Blocks | None = None,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """(y + s (x A^T) B, h_NxRxT = A x^T), as `reference.forward`.

    Raises NotImplementedError where a dtype is not bfloat16 or float32, or where blocks do not fit VMEM.
    """
    (users, tokens, d_in), (_, rank, d_out) = x_NxTxD.shape, b_NxRxF.shape
    dtype = x_NxTxD.dtype if y_NxTxF is None else y_NxTxF.dtype
    check_dtypes(x_NxTxD, a_NxRxD, b_NxRxF, y_NxTxF)
    if rank == 1:
        out_NxTxF, h_NxRxT = forward(
            x_NxTxD,
            two_rows(a_NxRxD, (1,)),
            two_rows(b_NxRxF, (1,)),
            scale_N,
            y_NxTxF,
            blocks=blocks,
            interpret=interpret,
        )
        return out_NxTxF, h_NxRxT[:, :1]
    blocks = blocks or _forward_blocks(tokens, d_in, d_out, rank, x_NxTxD.dtype.itemsize, dtype.itemsize)
    steps_in, steps_out = cdiv(d_in, blocks.d_in), cdiv(d_out, blocks.d_out)
    tile = blocks.tile
    column = phases(steps_in)
    in_specs = [
        pl.BlockSpec(memory_space=pltpu.SMEM),
        pl.BlockSpec((None, tile, blocks.d_in), lambda n, t, k: (n, t, column(k)[0])),
        pl.BlockSpec((None, rank, blocks.d_in), lambda n, t, k: (n, 0, column(k)[0])),
        pl.BlockSpec((None, rank, blocks.d_out), lambda n, t, k: (n, 0, column(k)[1])),
    ]
    out_spec = pl.BlockSpec((None, tile, blocks.d_out), lambda n, t, k: (n, t, column(k)[1]))
    operands = [scale_N.astype(jnp.float32), x_NxTxD, a_NxRxD, b_NxRxF]
    if y_NxTxF is not None:
        in_specs.append(out_spec)
        operands.append(y_NxTxF)
    h_dtype = x_NxTxD.dtype
    return pl.pallas_call(
        functools.partial(_forward_kernel, steps_in=steps_in, has_y=y_NxTxF is not None),
        grid=(users, cdiv(tokens, tile), steps_in + steps_out),
        in_specs=in_specs,
        out_specs=[out_spec, pl.BlockSpec((None, rank, tile), lambda n, t, k: (n, 0, t))],
        out_shape=[
            jax.ShapeDtypeStruct((users, tokens, d_out), dtype),
            jax.ShapeDtypeStruct((users, rank, tokens), h_dtype),
        ],
        scratch_shapes=[pltpu.VMEM((tile, rank), jnp.float32)],
        input_output_aliases={} if y_NxTxF is None else {4: 0},
        compiler_params=compiler_params(("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(
            users * tokens * rank * (d_in + d_out),
            operands,
            (users * tokens * d_out, dtype),
            (users * tokens * rank, h_dtype),
        ),
        name="popax_stacked_lora_forward",
        interpret=interpret,
    )(*operands)


def _forward_kernel(scale, x, a, b, *rest, steps_in: int, has_y: bool):
    y, (out, h, acc_txr) = (rest[0], rest[1:]) if has_y else (None, rest)
    user, step = pl.program_id(0), pl.program_id(2)

    @pl.when(step == 0)
    def _():
        acc_txr[...] = jnp.zeros_like(acc_txr)

    @pl.when(step < steps_in)
    def _():
        acc_txr[...] += dot(x[...], a[...].astype(x.dtype), ((1,), (1,)))

    @pl.when(step == steps_in)
    def _():
        h[...] = acc_txr[...].T.astype(h.dtype)

    @pl.when(step >= steps_in)
    def _():
        scaled_txr = (acc_txr[...] * scale[user]).astype(x.dtype)
        delta_txf = dot(scaled_txr, b[...].astype(x.dtype), ((1,), (0,)))
        out[...] = (delta_txf if y is None else y[...].astype(jnp.float32) + delta_txf).astype(out.dtype)


def backward(
    g_NxTxF: jax.Array,
    x_NxTxD: jax.Array,
    h_NxRxT: jax.Array,
    a_NxRxD: jax.Array,
    b_NxRxF: jax.Array,
    scale_N: jax.Array,
    *,
    blocks: Blocks | None = None,
    interpret=False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(dx, dA, dB, ds) for the cotangent g, as `reference.backward`; g and x are read once.

    dA and dB of the user at hand gather in float32 VMEM over the token tiles. Raises NotImplementedError where they do
    not fit, or where a dtype is not bfloat16 or float32.
    """
    (users, tokens, d_in), (_, rank, d_out) = x_NxTxD.shape, b_NxRxF.shape
    check_dtypes(g_NxTxF, x_NxTxD, a_NxRxD, b_NxRxF)
    if rank == 1:
        two = (two_rows(h_NxRxT, (1,)), two_rows(a_NxRxD, (1,)), two_rows(b_NxRxF, (1,)))
        dx_NxTxD, da_NxRxD, db_NxRxF, ds_N = backward(
            g_NxTxF, x_NxTxD, *two, scale_N, blocks=blocks, interpret=interpret
        )
        return dx_NxTxD, da_NxRxD[:, :1], db_NxRxF[:, :1], ds_N
    blocks = blocks or _backward_blocks(tokens, d_in, d_out, rank, g_NxTxF.dtype.itemsize, x_NxTxD.dtype.itemsize)
    steps_out, steps_in = cdiv(d_out, blocks.d_out), cdiv(d_in, blocks.d_in)
    tile, tiles = blocks.tile, cdiv(tokens, blocks.tile)
    column = phases(steps_out)
    x_spec = pl.BlockSpec((None, tile, blocks.d_in), lambda n, t, k: (n, t, column(k)[1]))
    whole_a = pl.BlockSpec((None, rank, d_in), lambda n, t, k: (n, 0, 0))
    whole_b = pl.BlockSpec((None, rank, d_out), lambda n, t, k: (n, 0, 0))
    operands = [scale_N.astype(jnp.float32), g_NxTxF, x_NxTxD, h_NxRxT, a_NxRxD, b_NxRxF]
    dx_NxTxD, da_NxRxD, db_NxRxF, gb_NxRxT = pl.pallas_call(
        functools.partial(_backward_kernel, steps_out=steps_out, tiles=tiles, tokens=tokens, tile=tile),
        grid=(users, tiles, steps_out + steps_in),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((None, tile, blocks.d_out), lambda n, t, k: (n, t, column(k)[0])),
            x_spec,
            pl.BlockSpec((None, rank, tile), lambda n, t, k: (n, 0, t)),
            pl.BlockSpec((None, rank, blocks.d_in), lambda n, t, k: (n, 0, column(k)[1])),
            pl.BlockSpec((None, rank, blocks.d_out), lambda n, t, k: (n, 0, column(k)[0])),
        ],
        out_specs=[x_spec, whole_a, whole_b, pl.BlockSpec((None, rank, tile), lambda n, t, k: (n, 0, t))],
        out_shape=[
            jax.ShapeDtypeStruct(x_NxTxD.shape, x_NxTxD.dtype),
            jax.ShapeDtypeStruct(a_NxRxD.shape, a_NxRxD.dtype),
            jax.ShapeDtypeStruct(b_NxRxF.shape, b_NxRxF.dtype),
            jax.ShapeDtypeStruct((users, rank, tokens), x_NxTxD.dtype),
        ],
        scratch_shapes=[
            pltpu.VMEM((tile, rank), jnp.float32),
            pltpu.VMEM((steps_in, rank, blocks.d_in), jnp.float32),
            pltpu.VMEM((steps_out, rank, blocks.d_out), jnp.float32),
        ],
        compiler_params=compiler_params(("parallel", "arbitrary", "arbitrary")),
        cost_estimate=_cost(
            2 * users * tokens * rank * (d_in + d_out),
            [*operands, a_NxRxD, b_NxRxF],
            (users * tokens * d_in, x_NxTxD.dtype),
            (users * tokens * rank, x_NxTxD.dtype),
        ),
        name="popax_stacked_lora_backward",
        interpret=interpret,
    )(*operands)
    ds_N = jnp.sum(gb_NxRxT.astype(jnp.float32) * h_NxRxT.astype(jnp.float32), axis=(1, 2))
    return dx_NxTxD, da_NxRxD, db_NxRxF, ds_N.astype(scale_N.dtype)


def _backward_kernel(scale, g, x, h, a, b, dx, da, db, gb, acc_txr, da_acc, db_acc, *, steps_out, tiles, tokens, tile):
    user, at_tile, step = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    left = tokens - at_tile * tile
    ragged = tokens % tile != 0

    @pl.when((at_tile == 0) & (step == 0))
    def _():
        da_acc[...] = jnp.zeros_like(da_acc)
        db_acc[...] = jnp.zeros_like(db_acc)

    @pl.when(step == 0)
    def _():
        acc_txr[...] = jnp.zeros_like(acc_txr)

    @pl.when(step < steps_out)
    def _():
        # Rows beyond the last token hold anything, NaN included: they are replaced, not multiplied by zero.
        g_txf = (_first_rows(g[...], left) if ragged else g[...]).astype(x.dtype)
        h_rxt = _first_columns(h[...], left) if ragged else h[...]
        acc_txr[...] += dot(g_txf, b[...].astype(x.dtype), ((1,), (1,)))
        scaled_rxt = (h_rxt.astype(jnp.float32) * scale[user]).astype(x.dtype)
        db_acc[step] += dot(scaled_rxt, g_txf, ((1,), (0,)))

    @pl.when(step == steps_out)
    def _():
        gb[...] = acc_txr[...].T.astype(gb.dtype)

    @pl.when(step >= steps_out)
    def _():
        at = step - steps_out
        x_txd = _first_rows(x[...], left) if ragged else x[...]
        dh_txr = (acc_txr[...] * scale[user]).astype(x.dtype)
        dx[...] = dot(dh_txr, a[...].astype(x.dtype), ((1,), (0,))).astype(dx.dtype)
        da_acc[at] += dot(dh_txr, x_txd, ((0,), (0,)))

    @pl.when((at_tile == tiles - 1) & (step == pl.num_programs(2) - 1))
    def _():
        _write_columns(da, da_acc)
        _write_columns(db, db_acc)


def _write_columns(out, acc) -> None:
    block = acc.shape[2]
    for index in range(acc.shape[0]):
        out[:, index * block : (index + 1) * block] = acc[index].astype(out.dtype)


def _first_rows(block_txc: jax.Array, count: jax.Array) -> jax.Array:
    row_txc = jax.lax.broadcasted_iota(jnp.int32, block_txc.shape, 0)
    return jnp.where(row_txc < count, block_txc, jnp.zeros_like(block_txc))


def _first_columns(block_rxt: jax.Array, count: jax.Array) -> jax.Array:
    column_rxt = jax.lax.broadcasted_iota(jnp.int32, block_rxt.shape, 1)
    return jnp.where(column_rxt < count, block_rxt, jnp.zeros_like(block_rxt))


def _cost(products: int, operands, *results: tuple[int, jnp.dtype]) -> pl.CostEstimate:
    moved = sum(operand.size * operand.dtype.itemsize for operand in operands)
    written = sum(size * jnp.dtype(dtype).itemsize for size, dtype in results)
    return pl.CostEstimate(flops=2 * products, bytes_accessed=moved + written, transcendentals=0)


def _forward_blocks(tokens: int, d_in: int, d_out: int, rank: int, in_bytes: int, out_bytes: int) -> Blocks:
    """The tallest token tiles that fit, with the widest columns."""
    budget, tile = vmem_budget(), _tile(tokens)
    while True:
        for most in (4096, 2048, 1024, 512, 256, 128):
            blocks = Blocks(tile, divisor_block(d_in, most), divisor_block(d_out, most))
            held = 2 * (tile + _rows(rank)) * (blocks.d_in * in_bytes + 2 * blocks.d_out * out_bytes)
            if held + 3 * tile * LANES * 4 <= budget:
                return blocks
        if tile <= 128:
            raise NotImplementedError(f"tiles of {tile} x ({d_in}, {d_out}) at rank {rank} do not fit {budget} bytes")
        tile = max(tile // 2 // 128 * 128, 128)


def _backward_blocks(tokens: int, d_in: int, d_out: int, rank: int, out_bytes: int, in_bytes: int) -> Blocks:
    budget, tile = vmem_budget(), _tile(tokens)
    # The float32 sums of dA and dB, and their results, twice buffered.
    fixed = _rows(rank) * (d_in + d_out) * (4 + 2 * 4)
    while True:
        for most in (4096, 2048, 1024, 512, 256, 128):
            blocks = Blocks(tile, divisor_block(d_in, most), divisor_block(d_out, most))
            held = 2 * (tile + _rows(rank)) * (2 * blocks.d_in * in_bytes + blocks.d_out * out_bytes)
            if fixed + held + 4 * tile * LANES * 4 <= budget:
                return blocks
        if tile <= 128:
            raise NotImplementedError(
                f"the sums of dA and dB at rank {rank}, {d_in} -> {d_out}, need {fixed} of {budget} bytes of VMEM"
            )
        tile = max(tile // 2 // 128 * 128, 128)


def _tile(tokens: int) -> int:
    """h is written as [R, tile] blocks: a tile covers all tokens or is a multiple of the lanes."""
    return min(tokens, 512)


def _rows(rank: int) -> int:
    return -(-rank // 16) * 16
