"""Which tiles of a flat row array meet which slots, as lists that a kernel's grid walks; built on the device.

A run is a stretch of consecutive rows of one slot inside one tile; a unit is a run with one chunk of the slot's rank.
Rows need not be sorted: a slot may have several runs. Ragged, empty and tiny groups are all the same to it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from popax.kernels.rows import nobody, places, search, starts


class Units(NamedTuple):
    """count[0] units. [first, end) are rows; an empty stretch has no adapter. slot and rank are valid even then."""

    count: jax.Array
    tile_U: jax.Array
    slot_U: jax.Array
    chunk_U: jax.Array
    first_U: jax.Array
    end_U: jax.Array
    rank_U: jax.Array


def by_tile(slot_M: jax.Array, rank_S: jax.Array, *, tile: int, rank_block: int, chunks: int, most_runs: int) -> Units:
    """Units in the order (tile, chunk, row): every tile has at least one, so that a walk over units writes all tiles.

    slot_M: int, -1 or out of range for nobody. rank_S: each slot's rank. most_runs: a bound on the runs of equal slots
    in the whole of slot_M; tiles may cut them further.
    """
    rows, slots = slot_M.shape[0], rank_S.shape[0]
    key_M, place_M = nobody(slot_M, slots), jnp.arange(rows, dtype=jnp.int32)
    starts_M = starts(key_M) | (place_M % tile == 0)
    runs = min(rows, -(-rows // tile) + most_runs)
    first_V = places(starts_M, runs)
    end_V = jnp.concatenate([first_V[1:], jnp.full((1,), rows, jnp.int32)])
    key_V = key_M[jnp.minimum(first_V, rows - 1)]
    slot_V, owned_V = jnp.minimum(key_V, slots - 1), (key_V < slots) & (first_V < rows)
    rank_V = jnp.where(owned_V, jnp.clip(rank_S[slot_V], 0, chunks * rank_block), 0).astype(jnp.int32)
    chunks_V = jnp.where(first_V < rows, jnp.maximum((rank_V + rank_block - 1) // rank_block, 1), 0)
    ends_V = jnp.cumsum(chunks_V)
    unit_U = jnp.arange(runs * chunks, dtype=jnp.int32)
    run_U = jnp.minimum(search(ends_V, unit_U, side="right"), runs - 1)
    chunk_U = jnp.clip(unit_U - (ends_V - chunks_V)[run_U], 0, chunks - 1).astype(jnp.int32)
    real_U = unit_U < ends_V[-1]
    tile_U = jnp.minimum(first_V[run_U], rows - 1) // tile
    empty_U = ~real_U | (rank_V[run_U] == 0)
    end_U = jnp.where(empty_U, first_V[run_U], end_V[run_U])
    order_U = jnp.argsort(jnp.where(real_U, tile_U * chunks + chunk_U, jnp.iinfo(jnp.int32).max), stable=True)
    fields = (tile_U, slot_V[run_U], chunk_U, first_V[run_U], end_U, rank_V[run_U])
    return Units(ends_V[-1:].astype(jnp.int32), *(field[order_U].astype(jnp.int32) for field in fields))


def by_slot(units: Units, chunks: int) -> Units:
    """The units with an adapter, in the order (slot, chunk, tile); at least one, which may be empty."""
    owned_U = (units.end_U > units.first_U) & (jnp.arange(units.tile_U.shape[0]) < units.count[0])
    order_U = jnp.argsort(
        jnp.where(owned_U, units.slot_U * chunks + units.chunk_U, jnp.iinfo(jnp.int32).max), stable=True
    )
    count = jnp.maximum(jnp.sum(owned_U), 1).astype(jnp.int32)[None]
    return Units(count, *(field[order_U] for field in units[1:]))


def rank_of_rows(units: Units, rows: int) -> jax.Array:
    """int32 [rows]: the rank of each row's slot, 0 where it has none; from the units, of which there are few."""
    row_1xM = jnp.arange(rows, dtype=jnp.int32)[None]
    inside_UxM = (units.first_U[:, None] <= row_1xM) & (row_1xM < units.end_U[:, None]) & (units.chunk_U == 0)[:, None]
    return jnp.sum(jnp.where(inside_UxM, units.rank_U[:, None], 0), axis=0)
