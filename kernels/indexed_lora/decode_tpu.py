"""Decode on TPU: the adapters in use stream from HBM once, eight copies in flight, and no copy of them is gathered.

Work is a list of units (slot, rank chunk) for the slots that tokens name and the ranks that they have; it is built on
the device and prefetched into scalar memory, so the kernel's work follows tokens x actual rank, not slots. One launch
walks the column blocks of x (phase one: h = A x) and then those of every site's output (phase two: y + s B^T h), and
runs through all units in each. Products are on the vector unit: a matrix unit would load a whole tile of weights for a
single row. Tokens stay where they are: units name stretches of their order by slot.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from popax.kernels.indexed_lora.reference_decode import Site
from popax.kernels.rows import nobody, places, search, starts
from popax.kernels.tpu import LANES, cdiv, compiler_params, divisor_block, vmem_budget

MOST_TOKENS = 1024  # units, tokens and ranks are in scalar memory


class Blocks(NamedTuple):
    """rank: rows of a factor a copy; columns: of x and of the outputs a step; depth: copies in flight."""

    rank: int
    columns: int
    depth: int


class Units(NamedTuple):
    """count[0] units: slot, rank chunk, [first, end) in the order of the tokens, and the slot's rank."""

    count: jax.Array
    slot_U: jax.Array
    chunk_U: jax.Array
    first_U: jax.Array
    end_U: jax.Array
    rank_U: jax.Array
    order_T: jax.Array


def units(slot_T: jax.Array, rank_S: jax.Array, rank_block: int, most_rank: int) -> Units:
    """The units of a batch: for each slot in use, one for each `rank_block` rows of its rank."""
    tokens, slots = slot_T.shape[0], rank_S.shape[0]
    groups, chunks = min(tokens, slots), cdiv(most_rank, rank_block)
    key_T = nobody(slot_T, slots)
    order_T = jnp.argsort(key_T, stable=True).astype(jnp.int32)
    ordered_T = key_T[order_T]
    first_G = places(starts(ordered_T) & (ordered_T < slots), groups)
    slot_G = jnp.where(first_G < tokens, ordered_T[jnp.minimum(first_G, tokens - 1)], slots)
    end_G = search(ordered_T, slot_G, side="right")
    rank_G = jnp.where(slot_G < slots, jnp.minimum(rank_S[jnp.minimum(slot_G, slots - 1)], most_rank), 0)
    chunks_G = (rank_G + rank_block - 1) // rank_block
    ends_G = jnp.cumsum(chunks_G)
    unit_U = jnp.arange(groups * chunks, dtype=jnp.int32)
    group_U = jnp.minimum(search(ends_G, unit_U, side="right"), groups - 1)
    chunk_U = unit_U - (ends_G - chunks_G)[group_U]
    return Units(
        ends_G[-1:].astype(jnp.int32),
        jnp.minimum(slot_G[group_U], slots - 1),
        jnp.clip(chunk_U, 0, chunks - 1).astype(jnp.int32),
        first_G[group_U],
        end_G[group_U],
        rank_G[group_U].astype(jnp.int32),
        order_T,
    )


def decode(
    x_TxD: jax.Array,
    sites: tuple[Site, ...],
    scale: tuple[jax.Array, ...],
    slot_T: jax.Array,
    rank_S: jax.Array | None = None,
    *,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """out_t = y_t + s (x_t A[slot_t]^T) B[slot_t] for every site in one launch, as `reference_decode.decode`.

    Of a slot's rows, whole chunks of `blocks.rank` rows up to its rank are read. Raises NotImplementedError for more
    than 1,024 tokens, for D that is no multiple of 128, for rank 1 (a row of a packed dtype cannot be copied alone),
    and where the blocks do not fit.
    """
    (tokens, d_in), (slots, rank, _) = x_TxD.shape, sites[0][0].shape
    _check(x_TxD, sites)
    blocks = blocks or default_blocks(tokens, d_in, rank, len(sites), x_TxD.dtype.itemsize)
    rank_S = jnp.full((slots,), rank, jnp.int32) if rank_S is None else rank_S.astype(jnp.int32)
    work = units(slot_T, rank_S, blocks.rank, rank)
    block_in = divisor_block(d_in, blocks.columns)
    widths = [divisor_block(b_SxRxF.shape[2], blocks.columns) for _, b_SxRxF, _ in sites]
    steps = [cdiv(b_SxRxF.shape[2], width) for (_, b_SxRxF, _), width in zip(sites, widths, strict=True)]
    steps_in, chunks = d_in // block_in, cdiv(rank, blocks.rank)
    in_specs: list[Any] = [pl.BlockSpec((tokens, block_in), lambda k, *_: (0, jnp.minimum(k, steps_in - 1)))]
    operands, out_specs, out_shapes, scratch = [x_TxD], [], [], [pltpu.VMEM((tokens, block_in), jnp.float32)]
    begin, prefetched, aliases = steps_in, len(work) + len(sites), {}
    for (a_SxRxD, b_SxRxF, y_TxF), width, count in zip(sites, widths, steps, strict=True):
        spec = pl.BlockSpec((tokens, width), _site_block(begin, count))
        in_specs += [pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY)]
        operands += [a_SxRxD, b_SxRxF]
        if y_TxF is not None:
            in_specs.append(spec)
            aliases[prefetched + len(operands)] = len(out_specs)
            operands.append(y_TxF)
        out_specs.append(spec)
        dtype = x_TxD.dtype if y_TxF is None else y_TxF.dtype
        out_shapes.append(jax.ShapeDtypeStruct((tokens, b_SxRxF.shape[2]), dtype))
        scratch += [
            pltpu.VMEM((blocks.depth, blocks.rank, block_in), a_SxRxD.dtype),
            pltpu.VMEM((blocks.depth, blocks.rank, width), b_SxRxF.dtype),
            pltpu.VMEM((tokens, width), jnp.float32),
            pltpu.VMEM((tokens * chunks, blocks.rank, LANES), jnp.float32),
        ]
        begin += count
    plan = _Plan(blocks, chunks, rank, block_in, steps_in, widths, steps, tuple(y is not None for *_, y in sites))
    return tuple(
        pl.pallas_call(
            functools.partial(_kernel, plan=plan),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=prefetched,
                grid=(begin,),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=[*scratch, pltpu.SemaphoreType.DMA((blocks.depth,))],
            ),
            out_shape=out_shapes,
            input_output_aliases=aliases,
            compiler_params=compiler_params(("arbitrary",)),
            cost_estimate=_cost(x_TxD, sites),
            name="popax_indexed_lora_decode",
            interpret=interpret,
        )(*work, *(scale_S.astype(jnp.float32) for scale_S in scale), *operands)
    )


class _Plan(NamedTuple):
    blocks: Blocks
    chunks: int
    rank: int
    block_in: int
    steps_in: int
    widths: list[int]
    steps: list[int]
    has_y: tuple[bool, ...]


def _site_block(begin: int, count: int):
    return lambda k, *_: (0, jnp.clip(k - begin, 0, count - 1))


def _kernel(*refs, plan: _Plan):
    sites = len(plan.steps)
    work, refs = Units(*refs[: len(Units._fields)]), refs[len(Units._fields) :]
    scales, x, refs = refs[:sites], refs[sites], list(refs[sites + 1 :])
    inputs = [(refs.pop(0), refs.pop(0), refs.pop(0) if has_y else None) for has_y in plan.has_y]
    outs, (x32, *refs), semaphores = refs[:sites], refs[sites:-1], refs[-1]
    scratch = [refs[4 * index : 4 * index + 4] for index in range(sites)]
    step = pl.program_id(0)

    @pl.when(step == 0)
    def _():
        for *_, h in scratch:
            h[...] = jnp.zeros_like(h)

    @pl.when(step < plan.steps_in)
    def _():
        x32[...] = x[...].astype(jnp.float32)
        for (a, _, _), (ring, _, _, h) in zip(inputs, scratch, strict=True):
            shrink = functools.partial(_shrink, work, plan, x32, h)
            _stream(work, plan, a, step, plan.block_in, ring, semaphores, shrink)

    begin = plan.steps_in
    for site in range(sites):
        (_, b, y), (_, ring, out32, h) = inputs[site], scratch[site]

        @pl.when((step >= begin) & (step < begin + plan.steps[site]))
        def _(b=b, y=y, ring=ring, out32=out32, h=h, site=site, begin=begin):
            out32[...] = jnp.zeros_like(out32) if y is None else y[...].astype(jnp.float32)
            expand = functools.partial(_expand, work, plan, scales[site], h, out32)
            _stream(work, plan, b, step - begin, plan.widths[site], ring, semaphores, expand)
            outs[site][...] = out32[...].astype(outs[site].dtype)

        begin += plan.steps[site]


def _stream(work: Units, plan: _Plan, factor, column, width: int, ring, semaphores, use) -> None:
    """use(unit, its chunk of the factor's columns) for every unit, with `depth` copies ahead of the one in use."""
    depth, rows, count = plan.blocks.depth, plan.blocks.rank, work.count[0]

    def copy(unit):
        place = jax.lax.rem(unit, depth)
        row = pl.ds(pl.multiple_of(work.chunk_U[unit] * rows, rows), rows) if plan.chunks > 1 else slice(None)
        columns = pl.ds(pl.multiple_of(column * width, min(width, LANES)), width)
        source = factor.at[work.slot_U[unit], row, columns]
        return pltpu.make_async_copy(source, ring.at[place], semaphores.at[place])

    def start(unit):
        @pl.when(unit < count)
        def _():
            copy(unit).start()

    for unit in range(depth):
        start(jnp.int32(unit))

    def one(unit, carry):
        copy(unit).wait()
        use(unit, ring[jax.lax.rem(unit, depth)])
        # Only now may the next copy overwrite the place that was just read.
        start(unit + depth)
        return carry

    jax.lax.fori_loop(0, count, one, 0)


def _shrink(work: Units, plan: _Plan, x32, h, unit, a_rxd: jax.Array) -> None:
    """h += A x, its 128 lanes not yet added up."""
    a32_rxd = a_rxd.astype(jnp.float32)

    def token(place, carry):
        product_rxd = a32_rxd * x32[pl.ds(work.order_T[place], 1), :]
        groups = [product_rxd[:, at : at + LANES] for at in range(0, plan.block_in, LANES)]
        h[place * plan.chunks + work.chunk_U[unit]] += functools.reduce(jnp.add, groups)
        return carry

    jax.lax.fori_loop(work.first_U[unit], work.end_U[unit], token, 0)


def _expand(work: Units, plan: _Plan, scale, h, out32, unit, b_rxf: jax.Array) -> None:
    row_rx1 = jax.lax.broadcasted_iota(jnp.int32, (plan.blocks.rank, 1), 0)
    # Rows beyond the slot's rank hold anything: they are replaced, not multiplied by zero.
    live_rx1 = row_rx1 < work.rank_U[unit] - work.chunk_U[unit] * plan.blocks.rank
    b32_rxf = jnp.where(live_rx1, b_rxf.astype(jnp.float32), 0.0)
    factor = scale[work.slot_U[unit]]

    def token(place, carry):
        lanes_rxl = h[place * plan.chunks + work.chunk_U[unit]]
        h_rx1 = jnp.where(live_rx1, jnp.sum(lanes_rxl, axis=1, keepdims=True) * factor, 0.0)
        out32[pl.ds(work.order_T[place], 1), :] += jnp.sum(h_rx1 * b32_rxf, axis=0, keepdims=True)
        return carry

    jax.lax.fori_loop(work.first_U[unit], work.end_U[unit], token, 0)


def default_blocks(tokens: int, d_in: int, rank: int, sites: int, itemsize: int) -> Blocks:
    """Chunks of 16 rows (8 where 16 do not divide, else the whole rank), the widest columns that fit."""
    rows = next((size for size in (16, 8) if rank % size == 0), rank)
    budget = vmem_budget()
    partial = sites * tokens * cdiv(rank, rows) * max(rows, 8) * LANES * 4
    for depth in (8, 4):
        for columns in (4096, 2048, 1024, 512, 256, 128):
            rings = 2 * sites * depth * max(rows, 16) * columns * itemsize
            tiles = tokens * columns * ((1 + sites) * 4 + (2 + 4 * sites) * itemsize)
            if partial + rings + tiles <= budget:
                return Blocks(rows, columns, depth)
    raise NotImplementedError(f"{tokens} tokens at rank {rank} and {sites} sites do not fit {budget} bytes of VMEM")


def _check(x_TxD: jax.Array, sites: tuple[Site, ...]) -> None:
    (tokens, d_in), rank = x_TxD.shape, sites[0][0].shape[1]
    arrays = [x_TxD, *(each for site in sites for each in site if each is not None)]
    if any(array.dtype not in (jnp.bfloat16, jnp.float32) for array in arrays):
        raise NotImplementedError(f"dtypes {sorted({a.dtype.name for a in arrays})}: bfloat16 and float32 only")
    if tokens > MOST_TOKENS:
        raise NotImplementedError(f"{tokens} tokens: decode takes at most {MOST_TOKENS}, longer batches are grouped")
    if d_in % LANES:
        raise NotImplementedError(f"D = {d_in} is no multiple of {LANES}")
    if rank == 1:
        raise NotImplementedError("rank 1: a single row of a packed dtype cannot be copied alone")


def _cost(x_TxD: jax.Array, sites: tuple[Site, ...]) -> pl.CostEstimate:
    """At most: every token in a slot of its own. Never a function of the number of slots in the pool."""
    tokens, flops, moved = x_TxD.shape[0], 0, x_TxD.size * x_TxD.dtype.itemsize
    for a_SxRxD, b_SxRxF, y_TxF in sites:
        rows = a_SxRxD.shape[1] * (a_SxRxD.shape[2] + b_SxRxF.shape[2])
        flops += 2 * tokens * rows
        outputs = tokens * b_SxRxF.shape[2] * (x_TxD if y_TxF is None else y_TxF).dtype.itemsize
        moved += tokens * rows * a_SxRxD.dtype.itemsize + outputs * (1 if y_TxF is None else 2)
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)
