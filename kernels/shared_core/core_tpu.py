"""The core between shrink and expand in a TPU kernel, in the form that its layout asks for.

- PerUser: a grid step's rows are one user's: their [R, R] core is a block, and the product is on the matrix unit.
- PerRow: each row has weights of its own, [R, M] for diagonals and [R, R, M] for matrices, with the rows on the lanes:
  nothing is padded, and the products are on the vector unit. For diagonals, and for decode, where every row may have
  another slot and R * R entries are small beside the row's D + F.
- PerUnit: a tile's rows are a few runs of one slot each, whose cores stay in VMEM; a masked product for each run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from popax.kernels.tpu import LANES, SUBLANES, dot


class Form(NamedTuple):
    """operands, specs: what the core adds to a call. held: their bytes in VMEM.

    mix(refs, h_txr, at): s core(h) of a tile in float32, at = (user, tile). unmix(refs, gb_txr, h_txr, gram, at): the
    transposed core's product, and what the core's gradient is made of into `gram`, of which gram_shape and gram_spec
    say what it is. facts: whether the last operand is float32 [1, 2, M] (a row's scale, whether it has a core at all);
    rows without one keep y's bytes.
    """

    operands: tuple[jax.Array, ...]
    specs: tuple[pl.BlockSpec, ...]
    held: int
    mix: Callable[..., jax.Array]
    unmix: Callable[..., jax.Array] | None = None
    gram_shape: tuple[int, ...] = ()
    gram_spec: Any = None
    facts: bool = False


def _sum_over_tiles(gram, value, tile) -> None:
    @pl.when(tile == 0)
    def _():
        gram[...] = jnp.zeros_like(gram)

    gram[...] += value


def matrix_per_user(core_NxRxR: jax.Array, scale_N: jax.Array, dtype) -> Form:
    """gram: sum over tokens of gb_q h_r, float32 [N, R, R]."""
    users, rank, _ = core_NxRxR.shape
    spec = pl.BlockSpec((None, rank, rank), lambda n, t, k: (n, 0, 0))

    def mix(refs, h_txr, at):
        core, scale = refs
        return dot(h_txr, core[...], ((1,), (1,))) * scale[at[0]]

    def unmix(refs, gb_txr, h_txr, gram, at):
        core, scale = refs
        _sum_over_tiles(gram, dot(gb_txr.astype(h_txr.dtype), h_txr, ((0,), (0,))), at[1])
        return dot((gb_txr * scale[at[0]]).astype(h_txr.dtype), core[...], ((1,), (0,)))

    return Form(
        (core_NxRxR.astype(dtype), scale_N.astype(jnp.float32)),
        (spec, pl.BlockSpec(memory_space=pltpu.SMEM)),
        6 * padded_bytes(rank, rank, 4),
        mix,
        unmix,
        (users, rank, rank),
        spec,
    )


def diagonal_per_user(core_NxR: jax.Array, scale_N: jax.Array) -> Form:
    """gram: sum over tokens of gb_r h_r, float32 [N, 1, R]."""
    users, rank = core_NxR.shape
    spec = pl.BlockSpec((None, 1, rank), lambda n, t, k: (n, 0, 0))
    weights_Nx1xR = (core_NxR.astype(jnp.float32) * scale_N.astype(jnp.float32)[:, None])[:, None]

    def mix(refs, h_txr, at):
        return h_txr.astype(jnp.float32) * refs[0][...]

    def unmix(refs, gb_txr, h_txr, gram, at):
        _sum_over_tiles(gram, jnp.sum(gb_txr * h_txr.astype(jnp.float32), axis=0, keepdims=True), at[1])
        return gb_txr * refs[0][...]

    return Form((weights_Nx1xR,), (spec,), 4 * padded_bytes(1, rank, 4), mix, unmix, (users, 1, rank), spec)


def diagonal_per_row(weights_RxM: jax.Array, facts_1x2xM: jax.Array, tile: int) -> Form:
    """weights: s d of each row, zero without a core. gram: gb_r h_r of each row, float32 [1, R, M]."""
    rank, rows = weights_RxM.shape
    spec = pl.BlockSpec((None, rank, tile), lambda n, t, k: (n, 0, t))

    def mix(refs, h_txr, at):
        return h_txr.astype(jnp.float32) * refs[0][...].T

    def unmix(refs, gb_txr, h_txr, gram, at):
        gram[...] = (gb_txr * h_txr.astype(jnp.float32)).T
        return gb_txr * refs[0][...].T

    operands = (weights_RxM.astype(jnp.float32)[None], facts_1x2xM)
    held = 4 * padded_bytes(rank, tile, 4) + _facts_bytes(tile)
    return Form(operands, (spec, _facts_spec(tile)), held, mix, unmix, (1, rank, rows), spec, True)


def matrix_per_row(core_RxRxM: jax.Array, facts_1x2xM: jax.Array, tile: int) -> Form:
    """Forward only: a few result rows of the core at a time, so that the products stay in registers."""
    rank = core_RxRxM.shape[0]
    spec = pl.BlockSpec((rank, rank, tile), lambda n, t, k: (0, 0, t))
    few = SUBLANES if rank % SUBLANES == 0 else rank

    def mix(refs, h_txr, at):
        core, facts = refs
        h_rxt = h_txr.astype(jnp.float32).T
        parts = [
            jnp.sum(core[first : first + few].astype(jnp.float32) * h_rxt[None], axis=1)
            for first in range(0, rank, few)
        ]
        return (jnp.concatenate(parts, axis=0) * facts[0:1]).T

    held = 2 * rank * padded_bytes(rank, tile, core_RxRxM.dtype.itemsize) + few * padded_bytes(rank, tile, 4)
    return Form((core_RxRxM, facts_1x2xM), (spec, _facts_spec(tile)), held + _facts_bytes(tile), mix, facts=True)


class Runs(NamedTuple):
    """U runs in the order of the tiles: the rows [first, end), and the scale; begin_P1: a tile's first run."""

    first_U: jax.Array
    end_U: jax.Array
    scale_U: jax.Array
    begin_P1: jax.Array


def matrix_per_unit(core_UxRxR: jax.Array, runs: Runs, facts_1x2xM: jax.Array, tile: int) -> Form:
    """gram: the sum over a run's rows of gb_q h_r, float32 [U, R, R]; anything for runs that no tile has."""
    units, rank, _ = core_UxRxR.shape
    spec = pl.BlockSpec((units, rank, rank), lambda n, t, k: (0, 0, 0))
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)

    def mine(refs, at, unit, shape):
        _, first, end, *_ = refs
        row = at[1] * tile + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        return (row >= first[unit]) & (row < end[unit])

    def walk(refs, at, step, start):
        begin = refs[4]
        return jax.lax.fori_loop(begin[at[1]], begin[at[1] + 1], step, start)

    def mix(refs, h_txr, at):
        core, _, _, scale, *_ = refs

        def run(unit, mixed_txr):
            # Only the run's own rows: a NaN of its core times another row's zero would be NaN.
            product_txr = dot(h_txr, core[unit], ((1,), (1,))) * scale[unit]
            return jnp.where(mine(refs, at, unit, h_txr.shape), product_txr, mixed_txr)

        return walk(refs, at, run, jnp.zeros(h_txr.shape, jnp.float32))

    def unmix(refs, gb_txr, h_txr, gram, at):
        core, _, _, scale, *_ = refs

        def run(unit, dh_txr):
            own = mine(refs, at, unit, h_txr.shape)
            own_txr = jnp.where(own, gb_txr, 0.0)
            own_h_txr = jnp.where(own, h_txr.astype(jnp.float32), 0.0).astype(h_txr.dtype)
            gram[unit] = dot(own_txr.astype(h_txr.dtype), own_h_txr, ((0,), (0,)))
            product_txr = dot((own_txr * scale[unit]).astype(h_txr.dtype), core[unit], ((1,), (0,)))
            return jnp.where(own, product_txr, dh_txr)

        return walk(refs, at, run, jnp.zeros(h_txr.shape, jnp.float32))

    held = 2 * units * padded_bytes(rank, rank, core_UxRxR.dtype.itemsize + 4) + _facts_bytes(tile)
    return Form(
        (core_UxRxR, *runs, facts_1x2xM),
        (spec, smem, smem, smem, smem, _facts_spec(tile)),
        held,
        mix,
        unmix,
        (units, rank, rank),
        spec,
        True,
    )


def _facts_spec(tile: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, 2, tile), lambda n, t, k: (n, 0, t))


def _facts_bytes(tile: int) -> int:
    return 2 * padded_bytes(2, tile, 4)


def padded_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Of [rows, columns] in VMEM: whole lanes, whole packed sublanes."""
    return -(-rows // 16) * 16 * -(-columns // LANES) * LANES * itemsize
