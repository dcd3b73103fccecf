"""The op's launches on TPU, forward and backward: every activation is read once and written once.

A launch walks (user, row tile, step); rows with a slot each are one user's to it. Its steps are two phases over column
blocks: the first reduces over one side's columns into a [tile, R] product that stays in VMEM, where the core is applied
to it (`core_tpu`), the second expands it over the other side's. A block whose index does not change from one step to
the next is not fetched again. The basis is the same for all: where it fits it is fetched once a launch.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from popax.kernels.shared_core.core_tpu import Form, padded_bytes
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

MakeForm = Callable[[int], Form]  # of a tile's rows


class Blocks(NamedTuple):
    """tile: rows; d_in, d_out: columns a step; resident: 1 where all of A and B stay in VMEM, 0 where they stream."""

    tile: int
    d_in: int
    d_out: int
    resident: int


def forward(x_NxTxD, a_RxD, b_RxF, y_NxTxF, make_form: MakeForm, blocks: Blocks | None, interpret):
    """(y + the mixed product's expansion, h_NxRxT)."""
    (users, tokens, d_in), (rank, d_out) = x_NxTxD.shape, b_RxF.shape
    dtype = x_NxTxD.dtype if y_NxTxF is None else y_NxTxF.dtype
    check_dtypes(x_NxTxD, a_RxD, b_RxF, y_NxTxF)
    if rank == 1:
        a_RxD, b_RxF = (two_rows(factor, axes=(0,)) for factor in (a_RxD, b_RxF))
    wide = max(rank, 2)
    sizes = (x_NxTxD.dtype.itemsize, 2 * dtype.itemsize, a_RxD.dtype.itemsize)
    blocks, form = _fit(make_form, tokens, d_in, d_out, wide, sizes, blocks)
    tile, steps_in, steps_out = blocks.tile, cdiv(d_in, blocks.d_in), cdiv(d_out, blocks.d_out)
    column = phases(steps_in)
    out_spec = pl.BlockSpec((None, tile, blocks.d_out), lambda n, t, k: (n, t, column(k)[1]))
    in_specs = [
        *form.specs,
        pl.BlockSpec((None, tile, blocks.d_in), lambda n, t, k: (n, t, column(k)[0])),
        _factor_spec(a_RxD, blocks.d_in, blocks, lambda k: column(k)[0]),
        _factor_spec(b_RxF, blocks.d_out, blocks, lambda k: column(k)[1]),
    ]
    operands = [*form.operands, x_NxTxD, a_RxD, b_RxF]
    if y_NxTxF is not None:
        in_specs.append(out_spec)
        operands.append(y_NxTxF)
    results = (
        jax.ShapeDtypeStruct((users, tokens, d_out), dtype),
        jax.ShapeDtypeStruct((users, wide, tokens), x_NxTxD.dtype),
    )
    out_NxTxF, h_NxRxT = pl.pallas_call(
        functools.partial(_forward_kernel, form=form, blocks=blocks, steps_in=steps_in, has_y=y_NxTxF is not None),
        grid=(users, cdiv(tokens, tile), steps_in + steps_out),
        in_specs=in_specs,
        out_specs=[out_spec, pl.BlockSpec((None, wide, tile), lambda n, t, k: (n, 0, t))],
        out_shape=list(results),
        scratch_shapes=[
            pltpu.VMEM((tile, wide), jnp.float32),
            pltpu.VMEM((tile, wide), x_NxTxD.dtype),
            pltpu.VMEM((tile, wide), jnp.float32),
        ],
        input_output_aliases={} if y_NxTxF is None else {len(operands) - 1: 0},
        compiler_params=compiler_params(("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(users * tokens, wide, (d_in, d_out), form, operands, results, products=1),
        name="popax_shared_core_forward",
        interpret=interpret,
    )(*operands)
    return out_NxTxF, h_NxRxT[:, :rank]


def _forward_kernel(*refs, form: Form, blocks: Blocks, steps_in: int, has_y: bool):
    core, (x, a, b, *rest) = refs[: len(form.specs)], refs[len(form.specs) :]
    y, (out, h, acc_txr, mixed_txr, own_txr) = (rest[0], rest[1:]) if has_y else (None, rest)
    at, step = (pl.program_id(0), pl.program_id(1)), pl.program_id(2)

    @pl.when(step == 0)
    def _():
        acc_txr[...] = jnp.zeros_like(acc_txr)

    @pl.when(step < steps_in)
    def _():
        acc_txr[...] += dot(x[...], _columns(a, step, blocks.d_in).astype(x.dtype), ((1,), (1,)))

    @pl.when(step == steps_in)
    def _():
        h_txr = acc_txr[...].astype(x.dtype)
        h[...] = acc_txr[...].T.astype(h.dtype)
        if form.facts:
            own_txr[...] = _own(core[-1], own_txr.shape)
            h_txr = jnp.where(own_txr[...] > 0.0, acc_txr[...], 0.0).astype(x.dtype)
        mixed_txr[...] = form.mix(core, h_txr, at).astype(x.dtype)

    @pl.when(step >= steps_in)
    def _():
        b_rxf = _columns(b, step - steps_in, blocks.d_out).astype(x.dtype)
        sum_txf = dot(mixed_txr[...], b_rxf, ((1,), (0,)))
        if y is not None:
            sum_txf = (y[...].astype(jnp.float32) + sum_txf).astype(out.dtype)
            if form.facts:
                # y's own bytes, and not y + 0, which would turn -0 into +0.
                sum_txf = jnp.where(own_txr[:, :1] > 0.0, sum_txf, y[...])
        out[...] = sum_txf.astype(out.dtype)


def backward(g_NxTxF, h_NxRxT, a_RxD, b_RxF, make_form: MakeForm, blocks: Blocks | None, interpret, tile=None):
    """(dx, the form's gram).

    Raises NotImplementedError for F that is no multiple of 128, which is fine for the interpreter alone: the compiler
    would copy all of g into whole lanes first.
    """
    (users, tokens, d_out), (rank, d_in) = g_NxTxF.shape, a_RxD.shape
    if not interpret and d_out % LANES:
        raise NotImplementedError(f"F = {d_out} is no multiple of {LANES}: g would be copied into whole lanes first")
    dtype = h_NxRxT.dtype
    check_dtypes(g_NxTxF, h_NxRxT, a_RxD, b_RxF)
    if rank == 1:
        a_RxD, b_RxF = (two_rows(factor, axes=(0,)) for factor in (a_RxD, b_RxF))
        h_NxRxT = two_rows(h_NxRxT, axes=(1,))
    wide = max(rank, 2)
    sizes = (dtype.itemsize, g_NxTxF.dtype.itemsize, a_RxD.dtype.itemsize)
    blocks, form = _fit(make_form, tokens, d_in, d_out, wide, sizes, blocks, tile)
    tile, steps_in, steps_out = blocks.tile, cdiv(d_in, blocks.d_in), cdiv(d_out, blocks.d_out)
    column = phases(steps_out)
    h_spec = pl.BlockSpec((None, wide, tile), lambda n, t, k: (n, 0, t))
    operands = [*form.operands, g_NxTxF, h_NxRxT, a_RxD, b_RxF]
    results = (
        jax.ShapeDtypeStruct((users, tokens, d_in), dtype),
        jax.ShapeDtypeStruct(form.gram_shape, jnp.float32),
    )
    return pl.pallas_call(
        functools.partial(_backward_kernel, form=form, blocks=blocks, steps_out=steps_out, tokens=tokens),
        grid=(users, cdiv(tokens, tile), steps_out + steps_in),
        in_specs=[
            *form.specs,
            pl.BlockSpec((None, tile, blocks.d_out), lambda n, t, k: (n, t, column(k)[0])),
            h_spec,
            _factor_spec(a_RxD, blocks.d_in, blocks, lambda k: column(k)[1]),
            _factor_spec(b_RxF, blocks.d_out, blocks, lambda k: column(k)[0]),
        ],
        out_specs=[pl.BlockSpec((None, tile, blocks.d_in), lambda n, t, k: (n, t, column(k)[1])), form.gram_spec],
        out_shape=list(results),
        scratch_shapes=[pltpu.VMEM((tile, wide), jnp.float32), pltpu.VMEM((tile, wide), dtype)],
        compiler_params=compiler_params(("parallel", "arbitrary", "arbitrary")),
        cost_estimate=_cost(users * tokens, wide, (d_in, d_out), form, operands, results, products=2),
        name="popax_shared_core_backward",
        interpret=interpret,
    )(*operands)


def _backward_kernel(*refs, form: Form, blocks: Blocks, steps_out: int, tokens: int):
    core, (g, h, a, b, dx, gram, acc_txr, dh_txr) = refs[: len(form.specs)], refs[len(form.specs) :]
    unmix = form.unmix
    assert unmix is not None, "a backward form has a gradient"
    at, step = (pl.program_id(0), pl.program_id(1)), pl.program_id(2)

    @pl.when(step == 0)
    def _():
        acc_txr[...] = jnp.zeros_like(acc_txr)

    @pl.when(step < steps_out)
    def _():
        b_rxf = _columns(b, step, blocks.d_out).astype(dh_txr.dtype)
        acc_txr[...] += dot(g[...].astype(dh_txr.dtype), b_rxf, ((1,), (1,)))

    @pl.when(step == steps_out)
    def _():
        gb_txr, h_txr = acc_txr[...], h[...].astype(jnp.float32).T
        real_txr = None
        if form.facts:
            real_txr = _own(core[-1], gb_txr.shape) > 0.0
        elif tokens % blocks.tile:
            # Rows beyond the last token hold anything, NaN included: they are replaced, not multiplied by zero.
            row_txr = jax.lax.broadcasted_iota(jnp.int32, gb_txr.shape, 0)
            real_txr = row_txr < tokens - at[1] * blocks.tile
        if real_txr is not None:
            gb_txr, h_txr = (jnp.where(real_txr, each, 0.0) for each in (gb_txr, h_txr))
        dh_txr[...] = unmix(core, gb_txr, h_txr.astype(dh_txr.dtype), gram, at).astype(dh_txr.dtype)

    @pl.when(step >= steps_out)
    def _():
        a_rxd = _columns(a, step - steps_out, blocks.d_in).astype(dh_txr.dtype)
        dx[...] = dot(dh_txr[...], a_rxd, ((1,), (0,))).astype(dx.dtype)


def _own(facts, shape: tuple[int, int]) -> jax.Array:
    """float32, 1 in the rows that have a core: the fact of each lane turned onto the sublanes."""
    tile, rank = shape
    return jnp.broadcast_to(facts[1:2], (max(rank, 8), tile)).T[:, :rank]


def _factor_spec(factor_RxC: jax.Array, width: int, blocks: Blocks, column) -> pl.BlockSpec:
    """All of it in a single buffer, or the column block of the step."""
    rank, columns = factor_RxC.shape
    if blocks.resident:
        return pl.BlockSpec((rank, columns), lambda n, t, k: (0, 0), pipeline_mode=pl.Buffered(1))
    return pl.BlockSpec((rank, width), lambda n, t, k: (0, column(k)))


def _columns(factor, step, width: int) -> jax.Array:
    """The step's columns of a factor that is resident, or that is this block already."""
    if factor.shape[1] == width:
        return factor[...]
    return factor[:, pl.ds(pl.multiple_of(step * width, min(width, LANES)), width)]


def _cost(rows: int, rank: int, columns, form: Form, operands, results, *, products: int) -> pl.CostEstimate:
    """What the launch moves: in its operands a core stands once a user, a run or a row, never once a slot."""
    moved = sum(each.size * each.dtype.itemsize for each in (*operands, *results))
    core = rank if form.operands[0].ndim == 3 and form.operands[0].shape[1] == rank else 1
    flops = 2 * rows * rank * (sum(columns) + products * core)
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)


def _fit(make_form: MakeForm, tokens: int, d_in: int, d_out: int, rank: int, sizes, blocks: Blocks | None, tile=None):
    """The given blocks, or the tallest tile, a basis that stays, and the widest columns that fit; the core's form.

    sizes: bytes of an entry of what has D columns, of what has F columns, and of a factor. tile: this one only.
    """
    if blocks is not None:
        return blocks, make_form(blocks.tile)
    in_bytes, out_bytes, factor_bytes = sizes
    budget = vmem_budget()
    first = tallest_tile(tokens) if tile is None else tile
    tiles = [first] if tile is not None else [each for each in (512, 256, 128) if each < first]
    held = 0
    for tile in dict.fromkeys((first, *tiles)):
        form = make_form(tile)
        for resident, widths in ((1, (4096, 2048, 1024, 512)), (0, (4096, 2048, 1024, 512, 256, 128))):
            for most in widths:
                found = Blocks(tile, divisor_block(d_in, most), divisor_block(d_out, most), resident)
                factors = padded_bytes(rank, d_in + d_out, factor_bytes)
                if not resident:
                    factors = 2 * padded_bytes(rank, found.d_in + found.d_out, factor_bytes)
                rows = tile * (2 * found.d_in * in_bytes + found.d_out * (2 * out_bytes + 4))
                held = factors + rows + form.held + 6 * padded_bytes(tile, rank, 4)
                if held <= budget:
                    return found, form
    raise NotImplementedError(f"tiles of {d_in} -> {d_out} at rank {rank} need {held} of {budget} bytes of VMEM")


def tallest_tile(rows: int) -> int:
    """h is written as [R, tile] blocks: a tile covers all rows or is a multiple of the lanes."""
    return min(rows, 512)
