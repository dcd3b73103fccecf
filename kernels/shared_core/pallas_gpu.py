"""The op on GPU: the shrink is one dense product, which is cuBLAS's work; core, expand and y in one Pallas-Triton pass.

A tile's rows are of one slot (popax.kernels.triton.Tiles), so its core is read once; the basis is everybody's and
stays in the L2 cache. A program walks a stretch of the columns, over which its core's product is shared.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from popax.kernels.shared_core import reference
from popax.kernels.triton import MIN_DOT, Tiles, named, padded_rank, parameters, product, run_tiles, stacked_tiles


class Blocks(NamedTuple):
    """tile: rows a program, 1 (products on the plain units) or a power of two >= 16. block: columns a step.

    span: columns a program, over which one product with the core is spread.
    """

    tile: int = 64
    block: int = 64
    span: int = 1024
    warps: int = 4
    stages: int = 3


def forward(
    x_NxTxD: jax.Array,
    a_RxD: jax.Array,
    b_RxF: jax.Array,
    core_N: jax.Array,
    scale_N: jax.Array,
    y_NxTxF: jax.Array | None = None,
    *,
    blocks: Blocks | None = None,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """(y + s core(x A^T) B, h_NxRxT), as `reference.forward`. Raises NotImplementedError for float64."""
    users, tokens, _ = x_NxTxD.shape
    blocks = blocks or default_blocks(tokens)
    _check(x_NxTxD, b_RxF)
    h_RxM = _shrink(_flat(x_NxTxD), a_RxD)
    tiles = stacked_tiles(users, tokens, blocks.tile)
    y_MxF = None if y_NxTxF is None else _flat(y_NxTxF)
    out_MxF = _mix_expand(h_RxM, core_N, b_RxF, scale_N, tiles, y_MxF, blocks, interpret)
    return out_MxF.reshape(users, tokens, -1), h_RxM.reshape(-1, users, tokens).transpose(1, 0, 2)


def backward(
    g_NxTxF: jax.Array,
    h_NxRxT: jax.Array,
    a_RxD: jax.Array,
    b_RxF: jax.Array,
    core_N: jax.Array,
    scale_N: jax.Array,
    *,
    blocks: Blocks | None = None,
    interpret=False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dx, dcore, ds), as `reference.backward`; the core's gradient is a small batched product, XLA's."""
    users, tokens, _ = g_NxTxF.shape
    blocks = blocks or default_blocks(tokens)
    _check(h_NxRxT, a_RxD)
    gb_RxM = _shrink(_flat(g_NxTxF).astype(h_NxRxT.dtype), b_RxF)
    tiles = stacked_tiles(users, tokens, blocks.tile)
    core_t_N = reference.transposed(core_N)
    dx_MxD = _mix_expand(gb_RxM, core_t_N, a_RxD, scale_N, tiles, None, blocks, interpret)
    gb_NxRxT = gb_RxM.reshape(-1, users, tokens).transpose(1, 0, 2)
    subscripts = "nqt,nrt->nqr" if core_N.ndim == 3 else "nrt,nrt->nr"
    gram_N = jnp.einsum(subscripts, gb_NxRxT, h_NxRxT, preferred_element_type=jnp.float32)
    wide = (...,) + (None,) * (core_N.ndim - 1)
    dcore_N = (gram_N * scale_N.astype(jnp.float32)[wide]).astype(core_N.dtype)
    ds_N = jnp.sum(gram_N * core_N.astype(jnp.float32), axis=tuple(range(1, core_N.ndim)))
    return dx_MxD.reshape(users, tokens, -1), dcore_N, ds_N.astype(scale_N.dtype)


def indexed_forward(
    x_MxD: jax.Array,
    a_RxD: jax.Array,
    b_RxF: jax.Array,
    core_S: jax.Array,
    scale_S: jax.Array,
    slot_M: jax.Array,
    rank_S: jax.Array,
    y_MxF: jax.Array,
    *,
    most_runs: int | None = None,
    blocks: Blocks | None = None,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """(y + s core[slot](x A^T) B, h_RxM), as `reference.indexed_forward`.

    most_runs: a bound on the runs of equal slots, else the number of rows: a tile never spans two.
    """
    most_runs = slot_M.shape[0] if most_runs is None else most_runs
    blocks = blocks or default_blocks(max(slot_M.shape[0] // most_runs, 1))
    _check(x_MxD, b_RxF)
    h_RxM = _shrink(x_MxD, a_RxD)
    tiles = run_tiles(slot_M, core_S.shape[0], blocks.tile, most_runs)
    return _mix_expand(h_RxM, core_S, b_RxF, scale_S, tiles, y_MxF, blocks, interpret, rank_S), h_RxM


def indexed_backward(
    g_MxF: jax.Array,
    h_RxM: jax.Array,
    a_RxD: jax.Array,
    b_RxF: jax.Array,
    core_S: jax.Array,
    scale_S: jax.Array,
    slot_M: jax.Array,
    rank_S: jax.Array,
    *,
    most_runs: int | None = None,
    blocks: Blocks | None = None,
    interpret=False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dx, dcore, ds), as `reference.indexed_backward`; a tile's part of a core's gradient is a product of its own."""
    most_runs = slot_M.shape[0] if most_runs is None else most_runs
    blocks = blocks or default_blocks(max(slot_M.shape[0] // most_runs, 1))
    _check(h_RxM, a_RxD)
    slots = core_S.shape[0]
    gb_RxM = _shrink(g_MxF.astype(h_RxM.dtype), b_RxF)
    tiles = run_tiles(slot_M, slots, blocks.tile, most_runs)
    core_t_S = reference.transposed(core_S)
    dx_MxD = _mix_expand(gb_RxM, core_t_S, a_RxD, scale_S, tiles, None, blocks, interpret, rank_S)
    gram_PxR = _grams(gb_RxM, h_RxM, tiles, core_S.ndim == 3, blocks, interpret)
    key_P = jnp.where((tiles.slot_P >= 0) & (tiles.end_P > tiles.first_P), tiles.slot_P, slots)
    gram_S = jnp.zeros(core_S.shape, jnp.float32).at[key_P].add(gram_PxR, mode="drop")
    used_S = jnp.zeros((slots,), bool).at[key_P].set(True, mode="drop")
    wide = (...,) + (None,) * (core_S.ndim - 1)
    live_S = reference.live(core_S.shape, rank_S) & used_S[wide]
    dcore_S = jnp.where(live_S, gram_S * scale_S.astype(jnp.float32)[wide], 0.0)
    ds_S = jnp.sum(jnp.where(live_S, gram_S * core_S.astype(jnp.float32), 0.0), axis=tuple(range(1, core_S.ndim)))
    return dx_MxD, dcore_S.astype(core_S.dtype), ds_S.astype(scale_S.dtype)


def default_blocks(tokens: int) -> Blocks:
    """Until a device has been tuned. tokens: consecutive rows of one slot."""
    if tokens == 1:
        return Blocks(tile=1, block=256, stages=4)
    return Blocks(tile=64 if tokens >= 64 else MIN_DOT)


def _shrink(x_MxD: jax.Array, a_RxD: jax.Array) -> jax.Array:
    """A x^T, [R, M] in x's dtype."""
    product = jnp.einsum("md,rd->rm", x_MxD, a_RxD.astype(x_MxD.dtype), preferred_element_type=jnp.float32)
    return product.astype(x_MxD.dtype)


def _mix_expand(h_RxM, core_S, b_RxF, scale_S, tiles: Tiles, y_MxF, blocks: Blocks, interpret, rank_S=None):
    (rank, rows), d_out = h_RxM.shape, b_RxF.shape[1]
    if rank_S is None:
        rank_S = jnp.full((core_S.shape[0],), rank, jnp.int32)
    dtype = h_RxM.dtype if y_MxF is None else y_MxF.dtype
    options = {"blocks": blocks, "rank": rank, "columns": d_out, "has_y": y_MxF is not None}
    core_entries = rank * rank if core_S.ndim == 3 else rank
    moved = (h_RxM.size + rows * core_entries + b_RxF.size) * h_RxM.dtype.itemsize
    moved += rows * d_out * jnp.dtype(dtype).itemsize * (1 if y_MxF is None else 2)
    return pl.pallas_call(
        named("popax_shared_core_expand", _mix_expand_kernel, **options),
        grid=(tiles.slot_P.shape[0], pl.cdiv(d_out, blocks.span)),
        out_shape=jax.ShapeDtypeStruct((rows, d_out), dtype),
        compiler_params=parameters(blocks),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * (rank * d_out + core_entries), bytes_accessed=moved, transcendentals=0
        ),
        name="popax_shared_core_expand",
        interpret=interpret,
    )(
        *tiles,
        rank_S.astype(jnp.int32),
        scale_S.astype(jnp.float32),
        h_RxM,
        core_S,
        b_RxF,
        *(() if y_MxF is None else (y_MxF,)),
    )


def _mix_expand_kernel(slot, first, end, ranks, scale, h, core, b, *rest, blocks, rank, columns, has_y):
    y, out = (rest[0], rest[1]) if has_y else (None, rest[0])
    program, tile, width = pl.program_id(0), blocks.tile, padded_rank(rank, blocks.tile)
    row_t, mine_t = _stretch(first[program], end[program], tile, out.shape[0])
    owner = slot[program]
    own = jnp.maximum(owner, 0)
    rank_r = jnp.arange(width, dtype=jnp.int32)
    live_r = (rank_r < ranks[own]) & (owner >= 0)
    h_txr = plgpu.load(h.at[rank_r[None, :], row_t[:, None]], mask=mine_t[:, None] & live_r[None, :], other=0.0)
    if len(core.shape) == 3:
        # Transposed: [r, q], for h C^T.
        core_rxq = plgpu.load(
            core.at[own, rank_r[None, :], rank_r[:, None]], mask=live_r[:, None] & live_r[None, :], other=0.0
        )
        mixed_txq = product(h_txr, core_rxq.astype(h_txr.dtype))
    else:
        core_r = plgpu.load(core.at[own, rank_r], mask=live_r, other=0.0)
        mixed_txq = h_txr.astype(jnp.float32) * core_r.astype(jnp.float32)[None, :]
    # Where there is no adapter the scale is somebody else's, and may be anything.
    scaled_txq = jnp.where(owner >= 0, mixed_txq * scale[own], 0.0).astype(h_txr.dtype)
    begin = pl.program_id(1) * blocks.span

    def step(index, carry):
        column_f = begin + index * blocks.block + jnp.arange(blocks.block, dtype=jnp.int32)
        inside_f = column_f < columns
        stored = mine_t[:, None] & inside_f[None, :]
        b_qxf = plgpu.load(
            b.at[rank_r[:, None], column_f[None, :]], mask=live_r[:, None] & inside_f[None, :], other=0.0
        )
        delta_txf = product(scaled_txq, b_qxf.astype(h_txr.dtype))
        place = out.at[row_t[:, None], column_f[None, :]]
        if y is None:
            plgpu.store(place, delta_txf.astype(out.dtype), mask=stored)
            return carry
        y_txf = plgpu.load(y.at[row_t[:, None], column_f[None, :]], mask=stored, other=0.0)
        sum_txf = (y_txf.astype(jnp.float32) + delta_txf).astype(out.dtype)
        # y's own bytes, and not y + 0, which would turn -0 into +0.
        plgpu.store(place, jnp.where(owner >= 0, sum_txf, y_txf), mask=stored)
        return carry

    left = jnp.minimum(columns - begin, blocks.span)
    steps = jnp.where(end[program] > first[program], (left + blocks.block - 1) // blocks.block, 0)
    jax.lax.fori_loop(0, steps, step, 0)


def _grams(gb_RxM, h_RxM, tiles: Tiles, matrix: bool, blocks: Blocks, interpret) -> jax.Array:
    """The sum over a tile's rows of gb_q h_r, float32 [P, R, R], or of gb_r h_r, [P, R]."""
    rank, rows = h_RxM.shape
    programs = tiles.slot_P.shape[0]
    shape = (programs, rank, rank) if matrix else (programs, rank)
    return pl.pallas_call(
        named("popax_shared_core_gradient", _grams_kernel, tile=max(blocks.tile, MIN_DOT), rank=rank, matrix=matrix),
        grid=(programs,),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        compiler_params=parameters(blocks),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * rank * (rank if matrix else 1),
            bytes_accessed=2 * h_RxM.size * h_RxM.dtype.itemsize + 4 * programs * rank * (rank if matrix else 1),
            transcendentals=0,
        ),
        name="popax_shared_core_gradient",
        interpret=interpret,
    )(*tiles, gb_RxM, h_RxM)


def _grams_kernel(slot, first, end, gb, h, gram, *, tile: int, rank: int, matrix: bool):
    del slot
    program, width = pl.program_id(0), padded_rank(rank, tile)
    row_t, mine_t = _stretch(first[program], end[program], tile, h.shape[1])
    rank_r = jnp.arange(width, dtype=jnp.int32)
    real_r = rank_r < rank
    gb_rxt, h_rxt = (
        plgpu.load(each.at[rank_r[:, None], row_t[None, :]], mask=real_r[:, None] & mine_t[None, :], other=0.0)
        for each in (gb, h)
    )
    if matrix:
        stored = real_r[:, None] & real_r[None, :]
        plgpu.store(
            gram.at[program, rank_r[:, None], rank_r[None, :]], product(gb_rxt, h_rxt, trans_b=True), mask=stored
        )
    else:
        sum_r = jnp.sum(gb_rxt.astype(jnp.float32) * h_rxt.astype(jnp.float32), axis=1)
        plgpu.store(gram.at[program, rank_r], sum_r, mask=real_r)


def _stretch(first, end, tile: int, rows: int):
    """(the tile's rows, which of them are real)."""
    row_t = first + jnp.arange(tile, dtype=jnp.int32)
    mine_t = row_t < end
    # `rows` for the others: the interpreter writes a masked place's old value back, and it may be somebody's.
    return jnp.where(mine_t, row_t, rows), mine_t


def _flat(x_NxTxD: jax.Array) -> jax.Array:
    return x_NxTxD.reshape(-1, x_NxTxD.shape[-1])


def _check(x: jax.Array, factor: jax.Array) -> None:
    for each in (x, factor):
        if each.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise NotImplementedError(f"an operand is {each.dtype}; the GPU form takes float32, bfloat16 and float16")
