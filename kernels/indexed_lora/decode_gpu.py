"""Decode on GPU: every site that shares x in one launch, or in two; nothing is sorted, gathered or copied.

A program has one token and sums on the plain units, or up to a tile of tokens of one slot on the tensor cores: it
finds them itself, by comparing its slot with all tokens', which is cheaper than the launches of a sort. In one launch,
a program has the whole of D and, with split > 1, a part of F, so that A is read split times (by the second, from
cache); in two, split parts of D are added when the second launch reads them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from popax.kernels import triton_lora
from popax.kernels.indexed_lora import grouped_gpu
from popax.kernels.indexed_lora.reference_decode import Site
from popax.kernels.rows import nobody
from popax.kernels.triton import MIN_DOT, named, padded_rank, parameters, product, ranks

NAME = "popax_indexed_lora_decode"
MOST_TOKENS = 1024  # every program reads every token's slot; more rows than that are `grouped`


class Blocks(NamedTuple):
    """tile: tokens a program, 1 or a power of two >= 16. block: columns a step. launches: 1 or 2. split: as above."""

    tile: int
    block: int
    split: int
    launches: int
    warps: int
    stages: int


class _Call(NamedTuple):
    """What every kernel of a call knows when it is traced. rank, columns: of each site."""

    blocks: Blocks
    tokens: int
    slots: int
    rank: tuple[int, ...]
    columns: tuple[int, ...]


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
    """out_t = y_t + s (x_t A[slot_t]^T) B[slot_t] for every site: `reference_decode.decode`.

    A slot's rows are read once for each tile of its tokens. Raises NotImplementedError for float64.
    """
    triton_lora.check(x_TxD)
    tokens, slots = x_TxD.shape[0], sites[0][0].shape[0]
    rank_S, scale = ranks(rank_S, sites[0][0]), tuple(scale_S.astype(jnp.float32) for scale_S in scale)
    if tokens > MOST_TOKENS:
        return tuple(
            grouped_gpu.forward(x_TxD, a, b, scale_S, slot_T, rank_S, y, interpret=interpret)[0]
            for (a, b, y), scale_S in zip(sites, scale, strict=True)
        )
    blocks = blocks or default_blocks(tokens, slots)
    call = _Call(
        *(blocks, tokens, slots),
        rank=tuple(a_SxRxD.shape[1] for a_SxRxD, *_ in sites),
        columns=tuple(b_SxRxF.shape[2] for _, b_SxRxF, _ in sites),
    )
    results = tuple(
        jax.ShapeDtypeStruct((tokens, b.shape[2]), x_TxD.dtype if y is None else y.dtype) for _, b, y in sites
    )
    shared = (slot_T.astype(jnp.int32), rank_S)
    launch = functools.partial(_launch, call, interpret)
    if blocks.launches == 1:
        operands = tuple((a, b, scale_S, y) for (a, b, y), scale_S in zip(sites, scale, strict=True))
        return launch("", _both, blocks.split, results, *shared, x_TxD, operands)
    parts = tuple(jax.ShapeDtypeStruct((blocks.split, rank, tokens), jnp.float32) for rank in call.rank)
    h = launch("_shrink", _shrink, blocks.split, parts, *shared, x_TxD, tuple((a,) for a, *_ in sites))
    operands = tuple((h_KxRxT, b, s_S, y) for h_KxRxT, (_, b, y), s_S in zip(h, sites, scale, strict=True))
    width = pl.cdiv(max(call.columns), blocks.block)
    return launch("_expand", _expand, width, results, *shared, operands)


def default_blocks(tokens: int, slots: int) -> Blocks:
    """Until a device has been tuned: tiles where tokens must share slots, single rows where they need not."""
    if tokens >= 4 * slots:
        return Blocks(tile=MIN_DOT, block=128, split=8, launches=2, warps=4, stages=3)
    return Blocks(tile=1, block=512, split=1, launches=1, warps=8, stages=1)


def candidates(tokens: int, distinct: int) -> tuple[Blocks, ...]:
    """Block sizes that are worth a clock, likely ones first."""
    single = [Blocks(1, block, 1, 1, warps, 1) for block, warps in ((512, 8), (1024, 8), (256, 4), (512, 4), (2048, 8))]
    single += [Blocks(1, block, split, 2, 4, 1) for block, split in ((512, 2), (1024, 4), (512, 8))]
    single += [Blocks(1, 512, 2, 1, 4, 1), Blocks(1, 1024, 4, 1, 4, 1)]
    shared = [Blocks(MIN_DOT, block, split, 2, 4, 4) for block, split in ((128, 8), (256, 8), (128, 16), (128, 4))]
    shared += [Blocks(MIN_DOT, block, split, 1, 4, 4) for block, split in ((128, 4), (128, 8), (256, 8))]
    return tuple(shared + single if tokens >= 4 * distinct else single + shared[:1])


def _launch(call: _Call, interpret, suffix: str, kernel, width: int, results, *operands):
    """kernel(call, site, program, the refs that the sites share, the site's, its result) for each site."""
    *shared, sites = operands
    leaves, tree = jax.tree.flatten((tuple(shared), sites))

    def body(*refs):
        common, own = jax.tree.unflatten(tree, refs[: len(leaves)])
        # Here, since the interpreter does not know the grid inside a branch.
        token, part, mine = (pl.program_id(axis) for axis in range(3))
        for at, each in enumerate(own):

            @_only_where(mine == at, len(own))
            def _(at=at, each=each):
                kernel(call, at, (token, part), common, each, refs[len(leaves) + at])

    name = NAME + suffix
    return pl.pallas_call(
        named(name, body),
        grid=(call.tokens, width, len(sites)),
        out_shape=results,
        compiler_params=parameters(call.blocks),
        cost_estimate=_cost(call, shared, sites, results),
        name=name,
        interpret=interpret,
    )(*leaves)


def _only_where(condition, sites: int):
    return pl.when(condition) if sites > 1 else lambda body: body()


def _cost(call: _Call, shared, sites, results) -> pl.CostEstimate:
    """The worst case: every token in a slot of its own. Never a function of the number of slots in the pool."""
    flops, moved = 0, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((shared[2:], results)))
    for leaf in jax.tree.leaves(sites):
        per_token = leaf.shape[1] * leaf.shape[2] if leaf.ndim == 3 and leaf.shape[0] == call.slots else 0
        moved += call.tokens * per_token * leaf.dtype.itemsize
        flops += 2 * call.tokens * per_token
        # Rows of y, and the parts of h.
        moved += leaf.size * leaf.dtype.itemsize if leaf.ndim > 1 and not per_token else 0
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)


class _Tile(NamedTuple):
    """owner: the rows' slot, -1 without an adapter. rows: 1 or `tile` of them. busy: whether the program has any."""

    owner: jax.Array
    row_t: jax.Array
    mine_t: jax.Array
    busy: jax.Array


def _tile(call: _Call, program, slot) -> _Tile:
    """The program's token, or it and the next ones of its slot if it is the first, the 17th, the 33rd... of them."""
    tile = call.blocks.tile
    key = nobody(slot[program], call.slots)
    owner = jnp.where(key == call.slots, -1, key)
    if tile == 1:
        row_t = program + jnp.arange(1, dtype=jnp.int32)
        return _Tile(owner, row_t, row_t < call.tokens, owner > -2)
    token_u = jnp.arange(pl.next_power_of_2(call.tokens), dtype=jnp.int32)
    real_u = token_u < call.tokens
    slot_u = plgpu.load(slot.at[token_u], mask=real_u, other=call.slots)
    same_u = (real_u & (nobody(slot_u, call.slots) == key)).astype(jnp.int32)
    before = jnp.sum(jnp.where(token_u < program, same_u, 0))
    # The place of each token among those of its slot, counted from 1.
    place_u = jnp.cumsum(same_u) * same_u
    chosen_txu = place_u[None, :] == (before + 1 + jnp.arange(tile, dtype=jnp.int32))[:, None]
    # At most one token in a row of it; none gives -1.
    row_t = jnp.max(jnp.where(chosen_txu, token_u[None, :], -1), axis=1)
    busy = before % tile == 0
    mine_t = (row_t >= 0) & busy
    return _Tile(owner, jnp.where(mine_t, row_t, call.tokens), mine_t, busy)


def _both(call: _Call, at: int, program, common, site, out):
    slot, rank_S, x = common
    a, b, scale, y = site
    token, part = program
    tile = _tile(call, token, slot)
    h_rxt = _project(call, at, tile, rank_S, x, a, jnp.zeros_like(part), pl.cdiv(x.shape[1], call.blocks.block))
    steps = pl.cdiv(call.columns[at], call.blocks.block)
    share = pl.cdiv(steps, call.blocks.split)
    begin = part * share
    _spread(call, at, tile, rank_S, h_rxt, b, scale, y, out, begin, jnp.minimum(begin + share, steps))


def _shrink(call: _Call, at: int, program, common, site, h):
    slot, rank_S, x = common
    token, part = program
    tile, rank_r = _tile(call, token, slot), _rank_indices(call, at)
    steps = pl.cdiv(x.shape[1], call.blocks.block)
    share = pl.cdiv(steps, call.blocks.split)
    begin = part * share
    h_rxt = _project(call, at, tile, rank_S, x, site[0], begin, jnp.minimum(begin + share, steps))
    stored = (rank_r < call.rank[at])[:, None] & tile.mine_t[None, :]
    plgpu.store(h.at[part, rank_r[:, None], tile.row_t[None, :]], h_rxt, mask=stored)


def _expand(call: _Call, at: int, program, common, site, out):
    slot, rank_S = common
    h, b, scale, y = site
    token, begin = program
    tile, rank_r = _tile(call, token, slot), _rank_indices(call, at)
    stored = (rank_r < call.rank[at])[:, None] & tile.mine_t[None, :]
    parts = (
        plgpu.load(h.at[part, rank_r[:, None], tile.row_t[None, :]], mask=stored, other=0.0)
        for part in range(h.shape[0])
    )
    stop = jnp.minimum(begin + 1, pl.cdiv(call.columns[at], call.blocks.block))
    _spread(call, at, tile, rank_S, sum(parts), b, scale, y, out, begin, stop)


def _rank_indices(call: _Call, at: int) -> jax.Array:
    return jnp.arange(padded_rank(call.rank[at], call.blocks.tile), dtype=jnp.int32)


def _live(call: _Call, at: int, tile: _Tile, rank_S) -> jax.Array:
    return (_rank_indices(call, at) < rank_S[jnp.maximum(tile.owner, 0)]) & (tile.owner >= 0)


def _project(call: _Call, at: int, tile: _Tile, rank_S, x, a, begin, stop) -> jax.Array:
    """h_rxt = A x^T over the column blocks [begin, stop), in float32; zeros without an adapter."""
    own, block, rank_r = jnp.maximum(tile.owner, 0), call.blocks.block, _rank_indices(call, at)
    live_r, single = _live(call, at, tile, rank_S), call.blocks.tile == 1

    def step(index, acc):
        column_d = index * block + jnp.arange(block, dtype=jnp.int32)
        inside_d = column_d < x.shape[1]
        x_txd = plgpu.load(
            x.at[tile.row_t[:, None], column_d[None, :]], mask=tile.mine_t[:, None] & inside_d[None, :], other=0.0
        )
        a_rxd = plgpu.load(
            a.at[own, rank_r[:, None], column_d[None, :]], mask=live_r[:, None] & inside_d[None, :], other=0.0
        )
        if single:
            # Summed over d after the loop: a sum over threads at every step would wait for every step's loads.
            return acc + a_rxd.astype(jnp.float32) * x_txd.astype(jnp.float32)
        return acc + product(a_rxd.astype(x_txd.dtype), x_txd, trans_b=True)

    stop = jnp.where(tile.busy & (tile.owner >= 0), stop, begin)
    acc = jnp.zeros((rank_r.shape[0], block if single else call.blocks.tile), jnp.float32)
    acc = jax.lax.fori_loop(begin, stop, step, acc)
    return jnp.sum(acc, axis=1)[:, None] if single else acc


def _spread(call: _Call, at: int, tile: _Tile, rank_S, h_rxt, b, scale, y, out, begin, stop):
    """out = y + s h^T B over the column blocks [begin, stop); y's own bytes without an adapter."""
    own, block, rank_r = jnp.maximum(tile.owner, 0), call.blocks.block, _rank_indices(call, at)
    live_r, single = _live(call, at, tile, rank_S), call.blocks.tile == 1
    # A scale may be anything where nothing is live.
    scaled_rxt = jnp.where(live_r[:, None], h_rxt * scale[own], 0.0)

    def step(index, carry):
        column_f = index * block + jnp.arange(block, dtype=jnp.int32)
        inside_f = column_f < call.columns[at]
        stored = tile.mine_t[:, None] & inside_f[None, :]
        b_rxf = plgpu.load(
            b.at[own, rank_r[:, None], column_f[None, :]], mask=live_r[:, None] & inside_f[None, :], other=0.0
        )
        if single:
            delta_txf = jnp.sum(b_rxf.astype(jnp.float32) * scaled_rxt, axis=0)[None, :]
        else:
            delta_txf = product(scaled_rxt.T.astype(out.dtype), b_rxf.astype(out.dtype))
        place = (tile.row_t[:, None], column_f[None, :])
        if y is None:
            plgpu.store(out.at[place], delta_txf.astype(out.dtype), mask=stored)
            return carry
        y_txf = plgpu.load(y.at[place], mask=stored, other=0.0)
        sum_txf = (y_txf.astype(jnp.float32) + delta_txf).astype(out.dtype)
        # y's own bytes, and not y + 0, which would turn -0 into +0.
        plgpu.store(out.at[place], jnp.where(tile.owner >= 0, sum_txf, y_txf), mask=stored)
        return carry

    jax.lax.fori_loop(begin, jnp.where(tile.busy, stop, begin), step, 0)
