"""A parameter put together from slices of many stored tensors, strip by strip, where it will stay.

Beside the shard itself the host's memory holds a strip of a tensor and a tile for each thread: no tensor, no layer and
no parameter stands there a second time.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from popax.modeling.tensor_files import StoredTensor

# A strip is what one thread reads at a time: rows of what is stored, so many that a tile is worth its while, and more
# where they are short. The pages of whole rows count as the process's memory, whatever columns of them are wanted.
STRIP_ROWS, STRIP_ELEMENTS = 256, 1 << 20
# A transposition goes through tiles that stay in the second cache: 4 times as fast as `target[...] = stored.T`.
TILE_COLUMNS = 512
# Rows of a tile are no power of two apart, where all of them would compete for the same few lines of the cache.
TILE_PADDING = 8
# What jax's CPU devices ask of a buffer that they take as it is, without a copy.
ALIGNMENT = 64

# What reads a part of an array: its slice at these indices.
ReadPart = Callable[[tuple[slice, ...]], np.ndarray]
Device = Any  # jax.Device is a variable, and no type to a checker of types


class Slices(Protocol):
    """A tensor that can be read slice by slice: as it is stored, or as it is made from that while it is read.

    The one place for what changes a layer's weights on their way in: such a thing is a `Slices` around another one.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """What of the files it is made of."""
        ...

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """This slice, in any dtype that numpy converts; a slice of step 1 on each axis."""
        ...


class Source(NamedTuple):
    """Where a parameter comes from: a tensor for each index of its first axes (layers, experts), in their order.

    stacked: how many these axes are. transposed: the others are stored as [d_out, d_in].
    """

    tensors: list[Slices]
    stacked: int
    transposed: bool


def read_shards(
    read: ReadPart,
    shape: tuple[int, ...],
    sharding: NamedSharding | None,
    devices: Iterable[Device],
) -> dict[Device, jax.Array]:
    """{device: its shard} of an array of this shape, in the order of devices; read(index) is that part of it.

    A part that several devices have is read once, and one buffer exists at a time: the devices have it, or copies of
    it, before the next one is begun. Without a sharding a device has everything.
    """
    whole, devices = (slice(None),) * len(shape), list(devices)
    indices = sharding.devices_indices_map(shape) if sharding is not None else dict.fromkeys(devices, whole)
    arrays = {}
    for device in devices:
        if device not in arrays:
            buffer = read(indices[device] or whole)
            owners = [other for other in devices if indices[other] == indices[device]]
            arrays |= {other: jax.block_until_ready(jax.device_put(buffer, other)) for other in owners}
    return {device: arrays[device] for device in devices}


def read_array(read: ReadPart, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """The array of which each device of this process reads its own shard."""
    shards = read_shards(read, shape, sharding, sharding.addressable_devices_indices_map(shape))
    return jax.make_array_from_single_device_arrays(shape, sharding, list(shards.values()))


def read_shard(
    source: Source, shape: tuple[int, ...], dtype: np.dtype, pool: Executor, index: tuple[slice, ...]
) -> np.ndarray:
    """params[index] of one parameter of this shape, in this dtype: kernels turned to [d_in, d_out], layers stacked.

    Only the tensors of the layers and experts in the index are opened, and of them the pages of the slice are read.
    """
    bounds = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    buffer = aligned_empty(tuple(len(part) for part in bounds), np.dtype(dtype))
    inner = tuple(slice(part.start, part.stop) for part in bounds[source.stacked :])
    numbers = np.arange(len(source.tensors)).reshape(shape[: source.stacked])
    targets = buffer.reshape(-1, *buffer.shape[source.stacked :])

    first = inner[1] if source.transposed else inner[0]  # of what is stored

    def fill(tensor: Slices, target: np.ndarray, strip: slice) -> None:
        rows = slice(first.start + strip.start, first.start + strip.stop)
        if source.transposed:
            _copy_transposed(target[:, strip], tensor.read((rows, inner[0])))
        else:
            target[strip] = tensor.read((rows, *inner[1:]))

    jobs = [
        pool.submit(fill, source.tensors[int(numbers[position])], target, strip)
        for target, position in zip(targets, itertools.product(*bounds[: source.stacked]), strict=True)
        for strip in _strips(first.stop - first.start, source.tensors[0].shape[1:])
    ]
    try:
        for job in jobs:
            job.result()
    finally:
        for job in jobs:
            job.cancel()
    return buffer


def _strips(count: int, row: tuple[int, ...]) -> Iterator[slice]:
    """Of so many rows, each of this shape in the files."""
    rows = max(STRIP_ROWS, STRIP_ELEMENTS // math.prod(row))
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def _copy_transposed(target: np.ndarray, stored: np.ndarray) -> None:
    """target[...] = stored.T, where the conversion to target's dtype is made in rows as well."""
    tile = np.empty((stored.shape[0], TILE_COLUMNS + TILE_PADDING), target.dtype)
    for start in range(0, stored.shape[1], TILE_COLUMNS):
        part = stored[:, start : start + TILE_COLUMNS]
        rows = tile[:, : part.shape[1]]
        rows[...] = part
        target[start : start + TILE_COLUMNS] = rows.T


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """np.empty at an address that jax's CPU devices take without a copy; it belongs to them from then on."""
    nbytes = math.prod(shape) * dtype.itemsize
    room = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + nbytes].view(dtype).reshape(shape)
