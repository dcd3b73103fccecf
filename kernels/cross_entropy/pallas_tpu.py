"""The op on TPU: one pass over the vocabulary for each tile of rows, whose softmax and gradient stay in VMEM.

It is flash attention with x as queries and the head as keys and values (arXiv 2205.14135): per row a running maximum,
the sum of the others' exponentials and their weighted sum of the head's rows, rescaled when the maximum grows. The
target is left out of both sums, for the reason that `reference` gives, so its row of the head is needed by itself at
the end. It is picked up where it passes by: a one-hot product, which copies exactly, of those 128 entries of the
vocabulary that hold a target with the 128 rows that look for it. (A gather of columns from [D, V] makes the compiler
transpose the whole head.)
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from popax.kernels.cross_entropy.reference import finish
from popax.kernels.tpu import LANES, cdiv, compiler_params, dot, vmem_budget


class Blocks(NamedTuple):
    """tile: rows, all of them or a multiple of 128; vocab: entries of the vocabulary a step, a multiple of 128."""

    tile: int
    vocab: int


def nats(
    x_MxD: jax.Array,
    w: jax.Array,
    target_M: jax.Array,
    *,
    vocab_first: bool,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array]:
    """(nats_M,), as `reference.nats`. Raises NotImplementedError for other dtypes than bfloat16 and float32, and where
    blocks do not fit."""
    (nats_M,) = _launch(x_MxD, w, target_M, vocab_first, False, blocks, interpret)
    return (nats_M,)


def nats_and_gradient(
    x_MxD: jax.Array,
    w: jax.Array,
    target_M: jax.Array,
    *,
    vocab_first: bool,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """(nats_M, d nats / d x), as `reference.nats_and_gradient`; raises as `nats`."""
    nats_M, gradient_MxD = _launch(x_MxD, w, target_M, vocab_first, True, blocks, interpret)
    return nats_M, gradient_MxD


def _launch(x_MxD, w, target_M, vocab_first: bool, gradient: bool, blocks: Blocks | None, interpret):
    for array in (x_MxD, w):
        if array.dtype not in (jnp.bfloat16, jnp.float32):
            raise NotImplementedError(f"an operand is {array.dtype}; the TPU form takes bfloat16 and float32")
    (rows, embed), vocab = x_MxD.shape, w.shape[0 if vocab_first else 1]
    blocks = blocks or default_blocks(rows, embed, vocab, x_MxD.dtype.itemsize, w.dtype.itemsize, gradient)
    tiles, steps = cdiv(rows, blocks.tile), cdiv(vocab, blocks.vocab)
    by_row = pl.BlockSpec((blocks.tile, embed), lambda m, v: (m, 0))
    row_facts = pl.BlockSpec((1, blocks.tile), lambda m, v: (0, m))
    head = (
        pl.BlockSpec((blocks.vocab, embed), lambda m, v: (v, 0))
        if vocab_first
        else pl.BlockSpec((embed, blocks.vocab), lambda m, v: (0, v))
    )
    fact = pltpu.VMEM((blocks.tile, 1), jnp.float32)
    outputs = pl.pallas_call(
        functools.partial(_kernel, vocab=vocab, blocks=blocks, vocab_first=vocab_first, gradient=gradient),
        grid=(tiles, steps),
        in_specs=[row_facts, pl.BlockSpec(by_row.block_shape, by_row.index_map, pipeline_mode=pl.Buffered(1)), head],
        out_specs=[row_facts, *([by_row] if gradient else [])],
        out_shape=[
            jax.ShapeDtypeStruct((1, rows), jnp.float32),
            *([jax.ShapeDtypeStruct(x_MxD.shape, x_MxD.dtype)] if gradient else []),
        ],
        scratch_shapes=[fact, fact, fact, *([pltpu.VMEM((blocks.tile, embed), jnp.float32)] if gradient else [])],
        compiler_params=compiler_params(("parallel", "arbitrary")),
        cost_estimate=_cost(x_MxD, w, blocks, gradient),
        name="popax_cross_entropy_gradient" if gradient else "popax_cross_entropy",
        interpret=interpret,
    )(target_M.astype(jnp.int32)[None], x_MxD, w)
    return (outputs[0][0], *outputs[1:])


def _kernel(target, x, w, nats, *rest, vocab: int, blocks: Blocks, vocab_first: bool, gradient: bool):
    sums = (rest[0], rest[-1]) if gradient else None
    top, own, others = rest[1:4] if gradient else rest
    step, last = pl.program_id(1), pl.num_programs(1) - 1
    head_axis = 0 if vocab_first else 1
    target_tx1 = target[...].T
    column_txv = step * blocks.vocab + jax.lax.broadcasted_iota(jnp.int32, (blocks.tile, blocks.vocab), 1)

    @pl.when(step == 0)
    def _():
        top[...] = jnp.full_like(top, -jnp.inf)
        own[...] = jnp.full_like(own, -jnp.inf)
        others[...] = jnp.zeros_like(others)
        if sums is not None:
            for each in sums:
                each[...] = jnp.zeros_like(each)

    def visit(ragged: bool) -> None:
        w_block = w[...].astype(x.dtype)
        if ragged:
            # Beyond the vocabulary the block holds anything, NaN included: replaced, not multiplied by zero.
            entry = step * blocks.vocab + jax.lax.broadcasted_iota(jnp.int32, w_block.shape, head_axis)
            w_block = jnp.where(entry < vocab, w_block, jnp.zeros_like(w_block))
        logits_txv = dot(x[...], w_block, ((1,), (1 - head_axis,)))
        if ragged:
            logits_txv = jnp.where(column_txv < vocab, logits_txv, -jnp.inf)
        own_txv = column_txv == target_tx1
        new_top_tx1 = jnp.maximum(top[...], jnp.max(logits_txv, axis=1, keepdims=True))
        exp_txv = jnp.where(own_txv, 0.0, jnp.exp(logits_txv - new_top_tx1))
        rescale_tx1 = jnp.exp(top[...] - new_top_tx1)
        own[...] = jnp.maximum(own[...], jnp.max(jnp.where(own_txv, logits_txv, -jnp.inf), axis=1, keepdims=True))
        others[...] = others[...] * rescale_tx1 + jnp.sum(exp_txv, axis=1, keepdims=True)
        top[...] = new_top_tx1
        if sums is not None:
            picked, acc_txd = sums
            acc_txd[...] = acc_txd[...] * rescale_tx1 + dot(exp_txv.astype(x.dtype), w_block, ((1,), (head_axis,)))
            _pick_up(target, target_tx1, w_block, picked, step * blocks.vocab, head_axis)

    if vocab % blocks.vocab == 0:
        visit(ragged=False)
    else:
        pl.when(step < last)(lambda: visit(ragged=False))
        pl.when(step == last)(lambda: visit(ragged=True))

    @pl.when(step == last)
    def _():
        nats_tx1, total_tx1 = finish(top[...], own[...], others[...])
        nats[...] = nats_tx1.T
        if sums is not None:
            picked, acc_txd = sums
            target_txd = picked[...].astype(jnp.float32)
            picked[...] = ((acc_txd[...] - others[...] * target_txd) / total_tx1).astype(picked.dtype)


def _pick_up(target, target_tx1, w_block, picked, first, head_axis: int) -> None:
    """Adds to `picked` the head's rows of those targets that lie in the block at hand; each target's passes once."""
    tile = target.shape[1]
    group = _group(tile)
    for row in range(0, tile, group):
        target_1xg = target[:, row : row + group]
        for start in range(0, w_block.shape[head_axis], LANES):
            inside_1xg = (target_1xg >= first + start) & (target_1xg < first + start + LANES)

            @pl.when(jnp.max(inside_1xg.astype(jnp.float32)) > 0)
            def _(row=row, start=start):
                column_gxl = first + start + jax.lax.broadcasted_iota(jnp.int32, (group, LANES), 1)
                one_hot_gxl = (column_gxl == target_tx1[row : row + group]).astype(w_block.dtype)
                part = jax.lax.slice_in_dim(w_block, start, start + LANES, axis=head_axis)
                picked[row : row + group] += dot(one_hot_gxl, part, ((1,), (head_axis,))).astype(picked.dtype)


def _group(tile: int) -> int:
    """Rows that look for their targets together: no more than one pass of the matrix unit takes anyway."""
    return LANES if tile % LANES == 0 else tile


def _cost(x_MxD, w, blocks: Blocks, gradient: bool) -> pl.CostEstimate:
    """The head once for each tile of rows. Picking up: as for targets drawn uniformly; text repeats its own."""
    rows, embed = x_MxD.shape
    vocab, tiles, group = w.size // embed, cdiv(rows, blocks.tile), _group(blocks.tile)
    places = cdiv(vocab, LANES)
    picking = round(rows * LANES * places * (1.0 - (1.0 - 1.0 / places) ** group))
    products = 2 * rows * vocab + picking if gradient else rows * vocab
    moved = x_MxD.size * x_MxD.dtype.itemsize * (2 if gradient else 1) + tiles * w.size * w.dtype.itemsize + 8 * rows
    return pl.CostEstimate(flops=2 * products * embed, bytes_accessed=moved, transcendentals=rows * vocab)


def default_blocks(rows: int, embed: int, vocab: int, x_bytes: int, w_bytes: int, gradient: bool) -> Blocks:
    """The tallest tile that fits, which reads the head least often, and then the widest block of it."""
    budget = vmem_budget()
    for most in (1024, 512, 256, 128):
        tile = rows if rows <= LANES else min(most, rows // LANES * LANES)
        for width in (1024, 512, 256, 128):
            # x once, the head's block twice buffered and once as a value, logits and what is made of them.
            held = tile * embed * x_bytes + width * embed * (2 * w_bytes + x_bytes) + 4 * tile * width * 4
            held += 6 * tile * LANES * 4
            if gradient:
                held += tile * embed * (2 * 4 + 2 * x_bytes)
            if held <= budget:
                return Blocks(tile, min(width, cdiv(vocab, LANES) * LANES))
    raise NotImplementedError(f"tiles of {embed} columns need {held} of {budget} bytes of VMEM")
