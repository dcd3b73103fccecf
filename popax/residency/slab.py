"""The device slots: one array a leaf, in which single slots are replaced in place."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from popax.adapters.cohort import Cohort
from popax.store.layout import RowLayout
from popax.types import AdapterState

# An update is compiled for so many slots, once each: what is more comes in several, what is less is filled up. Those
# much larger than the slab are left out.
CHUNKS = (1, 8, 64, 512)


class Slab:
    """Stacked adapters [L, S, ...] ([S, ...] at sites outside the layer stack), as `bind_slots` takes them.

    The arrays are donated to each update: it writes the slots and copies nothing else, and what was read from
    `arrays` before is gone after it. Not safe between threads.
    """

    def __init__(self, cohort: Cohort, layout: RowLayout, slots: int, sharding: jax.sharding.Sharding | None = None):
        """sharding: of every leaf (default: the default device)."""
        self._layout = layout
        self.slots, self.updates = slots, 0
        axes = {name: int(layered) for name, layered in cohort.layered.items()}

        def empty(axis: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            return jnp.zeros((*leaf.shape[:axis], slots, *leaf.shape[axis:]), leaf.dtype, device=sharding)

        self.arrays: AdapterState = {
            site: jax.tree.map(functools.partial(empty, axes[site]), leaves)
            for site, leaves in cohort.abstract().items()
        }
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.arrays)

        def update(arrays: AdapterState, new_N: AdapterState, slot_N: jax.Array) -> AdapterState:
            def written(axis: int, old: jax.Array, new: jax.Array) -> jax.Array:
                # A slot beyond the last one is a place to throw what fills up a chunk.
                if axis:
                    return old.at[:, slot_N].set(jnp.moveaxis(new, 0, 1), mode="drop")
                return old.at[slot_N].set(new, mode="drop")

            return {
                site: jax.tree.map(functools.partial(written, axes[site]), leaves, new_N[site])
                for site, leaves in arrays.items()
            }

        self._update = jax.jit(update, donate_argnums=0, out_shardings=shardings)
        self._compiled = {chunk: self._compile(chunk) for chunk in CHUNKS if chunk < 8 * slots or chunk == CHUNKS[0]}

    def write(self, slots: Sequence[int], rows: Sequence[np.ndarray]) -> None:
        """Put packed rows into these slots."""
        at = 0
        while at < len(slots):
            left = len(slots) - at
            chunk = next((size for size in self._compiled if size >= left), max(self._compiled))
            count = min(chunk, left)
            slot_N = np.full(chunk, self.slots, np.int32)
            slot_N[:count] = slots[at : at + count]
            rows_NxB = np.zeros((chunk, self._layout.row_bytes), np.uint8)
            rows_NxB[:count] = np.stack(rows[at : at + count])
            self.arrays = self._compiled[chunk](self.arrays, self._layout.unpack(rows_NxB), slot_N)
            self.updates += 1
            at += count

    def compiled(self, chunk: int) -> jax.stages.Compiled:
        """The program that replaces so many slots: what its text says about aliases is what happens."""
        return self._compiled[chunk]

    def _compile(self, chunk: int) -> jax.stages.Compiled:
        """Ahead of time: an executable cannot compile again, whoever becomes resident (invariant 7)."""
        rows = self._layout.unpack(np.zeros((chunk, self._layout.row_bytes), np.uint8))
        return self._update.lower(self.arrays, rows, np.zeros(chunk, np.int32)).compile()
