"""The op on TPU: forward and backward in one launch each, every activation read once and written once.

`walk_tpu` is the launch and `core_tpu` the core in it; here a core is put into the form that its layout asks for, and
what a launch gathers is made into gradients.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from popax.kernels.indexed_lora import groups
from popax.kernels.indexed_lora.slots import take_slots
from popax.kernels.rows import search
from popax.kernels.shared_core import core_tpu, reference, walk_tpu
from popax.kernels.shared_core.core_tpu import Form
from popax.kernels.shared_core.walk_tpu import Blocks
from popax.kernels.tpu import cdiv, two_rows

__all__ = ["Blocks", "backward", "forward", "indexed_backward", "indexed_forward"]


def forward(
    x_NxTxD: jax.Array,
    a_RxD: jax.Array,
    b_RxF: jax.Array,
    core_N: jax.Array,
    scale_N: jax.Array,
    y_NxTxF: jax.Array | None = None,
    *,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """(y + s core(x A^T) B, h_NxRxT = A x^T), as `reference.forward`.

    Raises NotImplementedError where a dtype is not bfloat16 or float32, or where blocks do not fit VMEM.
    """
    form = functools.partial(_per_user, two_rows(core_N, _rank_axes(core_N)), scale_N, x_NxTxD.dtype)
    return walk_tpu.forward(x_NxTxD, a_RxD, b_RxF, y_NxTxF, form, blocks, interpret)


def backward(
    g_NxTxF: jax.Array,
    h_NxRxT: jax.Array,
    a_RxD: jax.Array,
    b_RxF: jax.Array,
    core_N: jax.Array,
    scale_N: jax.Array,
    *,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dx, dcore, ds), as `reference.backward`; g is read once and x not at all."""
    rank = a_RxD.shape[0]
    form = functools.partial(_per_user, two_rows(core_N, _rank_axes(core_N)), scale_N, h_NxRxT.dtype)
    dx_NxTxD, gram = walk_tpu.backward(g_NxTxF, h_NxRxT, a_RxD, b_RxF, form, blocks, interpret)
    gram_N = gram[:, :rank, :rank] if core_N.ndim == 3 else gram[:, 0, :rank]
    wide = (...,) + (None,) * (core_N.ndim - 1)
    dcore_N = (gram_N * scale_N.astype(jnp.float32)[wide]).astype(core_N.dtype)
    ds_N = jnp.sum(gram_N * core_N.astype(jnp.float32), axis=tuple(range(1, core_N.ndim)))
    return dx_NxTxD, dcore_N, ds_N.astype(scale_N.dtype)


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
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """(y + s core[slot](x A^T) B, h_RxM), as `reference.indexed_forward`.

    most_runs: a bound on the runs of equal slots, else the number of rows. Matrices are gathered once a run of a tile
    where runs are longer than 16 rows or so, else once a row. A gathered core is read whole, with what is beyond its
    slot's rank replaced by zeros. Raises NotImplementedError as `forward`, and for matrices that would weigh too much
    beside their rows where each row needs its own.
    """
    runs = x_MxD.shape[0] if most_runs is None else most_runs
    if not interpret and core_S.ndim == 3 and _by_row(runs, x_MxD.shape[0]):
        _check_gather(core_S.shape[1], x_MxD.shape[1] + y_MxF.shape[1])
    form = functools.partial(_indexed_form, core_S, scale_S, slot_M, rank_S, runs, x_MxD.dtype, backward=False)
    out_1xMxF, h_1xRxM = walk_tpu.forward(x_MxD[None], a_RxD, b_RxF, y_MxF[None], form, blocks, interpret)
    return out_1xMxF[0], h_1xRxM[0]


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
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dx, dcore, ds), as `reference.indexed_backward`; matrices in runs, whose gradients fit VMEM together."""
    (slots, rank), rows = core_S.shape[:2], g_MxF.shape[0]
    runs = rows if most_runs is None else most_runs
    tile = walk_tpu.tallest_tile(rows) if blocks is None else blocks.tile
    form = functools.partial(_indexed_form, core_S, scale_S, slot_M, rank_S, runs, h_RxM.dtype, backward=True)
    dx_1xMxD, gram = walk_tpu.backward(g_MxF[None], h_RxM[None], a_RxD, b_RxF, form, blocks, interpret, tile=tile)
    own_M = reference.owned(slot_M, slots)
    if core_S.ndim == 3:
        units = _units(slot_M, slots, tile, runs)
        real_U = (jnp.arange(gram.shape[0]) < units.count[0]) & (units.end_U > units.first_U)
        part, key = gram[:, :rank, :rank], jnp.where(real_U, units.slot_U, slots)
    else:
        part, key = gram[0, :rank].T, jnp.where(own_M, slot_M, slots)
    # Added as flat rows: a [S, R, R] that is scattered to is padded to 128 lanes.
    flat_S = jnp.zeros((slots, core_S.size // slots), jnp.float32)
    gram_S = flat_S.at[key].add(part.reshape(part.shape[0], -1), mode="drop").reshape(core_S.shape)
    used_S = jnp.zeros((slots,), bool).at[jnp.where(own_M, slot_M, slots)].set(True, mode="drop")
    wide = (...,) + (None,) * (core_S.ndim - 1)
    # A slot's core may be anything beyond its rank, and all of it, with its scale, where no row uses it.
    live_S = reference.live(core_S.shape, rank_S) & used_S[wide]
    dcore_S = jnp.where(live_S, gram_S * scale_S.astype(jnp.float32)[wide], 0.0)
    ds_S = jnp.sum(jnp.where(live_S, gram_S * core_S.astype(jnp.float32), 0.0), axis=tuple(range(1, core_S.ndim)))
    return dx_1xMxD[0], dcore_S.astype(core_S.dtype), ds_S.astype(scale_S.dtype)


def _rank_axes(core_N: jax.Array) -> tuple[int, ...]:
    return tuple(range(1, core_N.ndim))


def _per_user(core_N, scale_N, dtype, tile: int) -> Form:
    del tile
    if core_N.ndim == 3:
        return core_tpu.matrix_per_user(core_N, scale_N, dtype)
    return core_tpu.diagonal_per_user(core_N, scale_N)


def _indexed_form(core_S, scale_S, slot_M, rank_S, runs: int, dtype, tile: int, *, backward: bool) -> Form:
    slots, rows = core_S.shape[0], slot_M.shape[0]
    own_M = reference.owned(slot_M, slots).astype(jnp.float32)
    scale_M = take_slots(scale_S.astype(jnp.float32), slot_M)
    facts_1x2xM = jnp.stack([scale_M, own_M])[None]
    if core_S.ndim == 2:
        weights_RxM = _diagonals(core_S, rank_S, slot_M).astype(jnp.float32) * scale_M[None]
        return core_tpu.diagonal_per_row(two_rows(weights_RxM, axes=(0,)), facts_1x2xM, tile)
    if not backward and _by_row(runs, rows):
        core_RxRxM = reference.live_cores(core_S, rank_S, slot_M).astype(dtype).transpose(1, 2, 0)
        return core_tpu.matrix_per_row(two_rows(core_RxRxM, axes=(0, 1)), facts_1x2xM, tile)
    units = _units(slot_M, slots, tile, runs)
    core_UxRxR = reference.live_cores(core_S, rank_S, units.slot_U).astype(dtype)
    real_U = jnp.arange(units.tile_U.shape[0]) < units.count[0]
    # Units beyond the count are in no tile; by_tile has the others in the order of their tiles.
    tile_U = jnp.where(real_U, units.tile_U, cdiv(rows, tile))
    begin_P1 = search(tile_U, jnp.arange(cdiv(rows, tile) + 1, dtype=jnp.int32), side="left")
    runs_U = core_tpu.Runs(units.first_U, units.end_U, scale_S.astype(jnp.float32)[units.slot_U], begin_P1)
    return core_tpu.matrix_per_unit(two_rows(core_UxRxR, (1, 2)), runs_U, facts_1x2xM, tile)


def _by_row(runs: int, rows: int) -> bool:
    return 16 * runs > rows


def _check_gather(rank: int, columns: int) -> None:
    if 16 * rank**2 >= columns:
        raise NotImplementedError(
            f"rank {rank}: a matrix gathered for every row is a sixteenth of the row's {columns} columns, or more"
        )


def _diagonals(core_SxR: jax.Array, rank_S: jax.Array, slot_M: jax.Array) -> jax.Array:
    """[R, M]: `reference.live_cores`, entry by entry out of a flat pool; rows of R would be padded to 128 lanes."""
    (slots, rank), own_M = core_SxR.shape, reference.owned(slot_M, core_SxR.shape[0])
    row_Rx1, slot_1xM = jnp.arange(rank, dtype=jnp.int32)[:, None], jnp.where(own_M, slot_M, 0)[None]
    core_RxM = core_SxR.T.reshape(-1)[row_Rx1 * slots + slot_1xM]
    live_RxM = own_M[None] & (row_Rx1 < take_slots(rank_S, slot_M)[None])
    return jnp.where(live_RxM, core_RxM, jnp.zeros((), core_SxR.dtype))


def _units(slot_M, slots: int, tile: int, runs: int) -> groups.Units:
    one_S = jnp.ones((slots,), jnp.int32)
    return groups.by_tile(slot_M, one_S, tile=tile, rank_block=1, chunks=1, most_runs=runs)
