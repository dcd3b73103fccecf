"""Weights that are read where they are contiguous, and exchanged between devices for where they are wanted.

What is stored is contiguous in rows. A shard of columns lies on about every page of a tensor, and replicas want the
same shard: processes that each read what they want read every file many times. Instead each one reads an equal share of
the rows, and the devices swap: an all-to-all turns shares of rows into shares of columns, an all-gather fills replicas.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from popax.modeling.shards import ReadPart, read_array

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """How an array like this is read, in slabs of its first axis, and how it is to lie.

    swapped: the axes that go from rows to columns; gathered: those over which it is replicated. row, column: the
    array's axes that are stored rows and columns.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    slabs: int
    read: NamedSharding
    wanted: NamedSharding
    swapped: Axes
    gathered: Axes
    row: int
    column: int

    def __call__(self, read: ReadPart) -> jax.Array:
        """The array as it is wanted; called by all processes of the mesh. One slab is on its way at a time."""
        if self.slabs == 1:
            return jax.block_until_ready(_exchanged(self, read_array(read, self.shape, self.read)))
        size = self.shape[0] // self.slabs
        array = jax.jit(lambda: jnp.zeros(self.shape, self.dtype), out_shardings=self.wanted)()
        for at in range(0, self.shape[0], size):
            shape = (size, *self.shape[1:])
            slab = read_array(functools.partial(_slab, read, slice(at, at + size)), shape, self.read)
            array = jax.block_until_ready(_filled(self, array, slab, np.int32(at)))
        return array

    def local(self, part: jax.Array) -> jax.Array:
        """What a device does, of what it read."""
        if self.gathered:
            part = jax.lax.all_gather(part, self.gathered, axis=self.row, tiled=True)
        if self.swapped:
            part = jax.lax.all_to_all(part, self.swapped, self.column, self.row, tiled=True)
        return part


def _slab(read: ReadPart, first: slice, index: tuple[slice, ...]) -> np.ndarray:
    return read((first, *index[1:]))


@functools.partial(jax.jit, static_argnums=0)
def _exchanged(plan: Exchange, part: jax.Array) -> jax.Array:
    specs = {"mesh": plan.read.mesh, "in_specs": plan.read.spec, "out_specs": plan.wanted.spec}
    return jax.shard_map(plan.local, **specs, check_vma=False)(part)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _filled(plan: Exchange, array: jax.Array, slab: jax.Array, at: np.int32) -> jax.Array:
    """The array with the exchanged slab in its place, in the array's memory."""

    def local(array: jax.Array, slab: jax.Array, at: jax.Array | np.int32) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(array, plan.local(slab), at, axis=0)

    specs = {"in_specs": (plan.wanted.spec, plan.read.spec, PartitionSpec()), "out_specs": plan.wanted.spec}
    return jax.shard_map(local, mesh=plan.read.mesh, **specs, check_vma=False)(array, slab, at)


def plan_exchange(
    like: jax.ShapeDtypeStruct, wanted: NamedSharding, *, stacked: int, transposed: bool
) -> Exchange | None:
    """How an array [stacked..., rows, columns], or with columns before rows where it is transposed, is read in rows.

    None where it is wanted in rows already, or its rows do not divide over the mesh.
    """
    shape = like.shape
    if len(shape) - stacked != 2:
        return None
    row, column = (stacked + 1, stacked) if transposed else (stacked, stacked + 1)
    entries = [_axes(entry) for entry in (*wanted.spec, *(None,) * (len(shape) - len(wanted.spec)))]
    mesh, swapped = wanted.mesh, entries[column]
    used = {axis for axes in entries for axis in axes}
    idle = tuple(axis for axis, size in mesh.shape.items() if axis not in used and size > 1)
    # The order decides which rows a device has: those it keeps first, then what is swapped, then what is gathered.
    if shape[row] % _size(mesh, entries[row] + swapped):
        return None
    gathered = idle if shape[row] % _size(mesh, entries[row] + swapped + idle) == 0 else ()
    if _size(mesh, swapped + gathered) == 1:
        return None
    entries[row], entries[column] = entries[row] + swapped + gathered, ()
    read = NamedSharding(mesh, PartitionSpec(*(axes or None for axes in entries)))
    return Exchange(
        shape=shape,
        dtype=np.dtype(like.dtype),
        slabs=shape[0] if stacked and not entries[0] else 1,
        read=read,
        wanted=wanted,
        swapped=swapped,
        gathered=gathered,
        row=row,
        column=column,
    )


def _axes(entry: str | Iterable[str] | None) -> Axes:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _size(mesh: Mesh | AbstractMesh, axes: Axes) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
