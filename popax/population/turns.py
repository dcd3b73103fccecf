"""More members than the device holds: they take turns in the slots, and wait in host memory.

A member is in the same slot at each of its turns, on the same devices: only the host and the device of one process
exchange it. Seats are numbered so that the seats of a block of the mesh's axis `population` follow each other, whatever
turn they are of: one array of all members [seats, ...] then lies over the axis as the slots do.
"""

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from popax.errors import ConfigError
from popax.population.placement import Placement
from popax.population.state import PopulationState

HOST_MEMORIES = ("pinned_host", "unpinned_host")
T = TypeVar("T")


class Turns:
    """`count` turns of the placement's slots. With one, everyone stays on the device."""

    def __init__(self, placement: Placement, count: int = 1):
        self.placement, self.count = placement, count
        self.seats = Placement(placement.slots * count, placement.mesh, placement.rules)

    def seats_of(self, turn: int) -> list[int]:
        """The seat of each slot in this turn."""
        block, waiting = self.placement.block_size, self.seats.block_size
        return [slot // block * waiting + turn * block + slot % block for slot in range(self.placement.slots)]

    def of_turn(self, values: Sequence[T], turn: int) -> list[T]:
        """Those of the seats' values that belong to the turn's slots."""
        return [values[seat] for seat in self.seats_of(turn)]

    def to_host(self, state: PopulationState) -> PopulationState:
        """The state in host memory."""
        return state if self.count == 1 else jax.tree.map(lambda leaf: _moved(leaf, _host_memory()), state)

    def to_device(self, state: PopulationState) -> PopulationState:
        """The state on the device."""
        return state if self.count == 1 else jax.tree.map(lambda leaf: _moved(leaf, _device_memory()), state)

    def join_turns(self, states: Sequence[PopulationState]) -> PopulationState:
        """All turns' members by seat [seats, ...], as the states lie: what a checkpoint holds."""
        return states[0] if self.count == 1 else jax.tree.map(self._concatenated, *states)

    def split_turns(self, state: PopulationState) -> tuple[PopulationState, ...]:
        """The inverse of `join_turns`."""
        if self.count == 1:
            return (state,)
        leaves, structure = jax.tree.flatten(state)
        parts = [self._split(leaf) for leaf in leaves]
        return tuple(jax.tree.unflatten(structure, [part[turn] for part in parts]) for turn in range(self.count))

    def _concatenated(self, *leaves: jax.Array) -> jax.Array:
        shards = zip(*(leaf.addressable_shards for leaf in leaves), strict=True)
        blocks = {
            one[0].device: np.concatenate([np.asarray(shard.data) for shard in one])
            for one in shards  # of one device, its part of each turn
        }
        return _from_blocks((self.seats.slots, *leaves[0].shape[1:]), leaves[0].sharding, blocks)

    def _split(self, leaf: jax.Array) -> list[jax.Array]:
        blocks = {shard.device: np.split(np.asarray(shard.data), self.count) for shard in leaf.addressable_shards}
        shape = (self.placement.slots, *leaf.shape[1:])
        return [
            _from_blocks(shape, leaf.sharding, {device: parts[turn] for device, parts in blocks.items()})
            for turn in range(self.count)
        ]


def converted(tree: T, dtype: str) -> T:
    """Leaves in this dtype, where they lie, by the host: what waits in its memory no device computes with."""

    def one(leaf: jax.Array) -> jax.Array:
        blocks = {shard.device: np.asarray(shard.data).astype(dtype) for shard in leaf.addressable_shards}
        return _from_blocks(leaf.shape, leaf.sharding, blocks)

    return jax.tree.map(one, tree)


def _from_blocks(shape: tuple[int, ...], sharding: Any, blocks: dict[Any, np.ndarray]) -> jax.Array:
    kind = sharding.memory_kind
    parts = [jax.device_put(block, SingleDeviceSharding(device, memory_kind=kind)) for device, block in blocks.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _moved(leaf: jax.Array, kind: str) -> jax.Array:
    return jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))


def _device_memory() -> str:
    return jax.local_devices()[0].default_memory().kind


@functools.cache
def _host_memory() -> str:
    """Pinned where there is such, from which a device can read by itself. Raises ConfigError where there is neither."""
    known = {memory.kind for memory in jax.local_devices()[0].addressable_memories()}
    for kind in HOST_MEMORIES:
        if kind in known:
            return kind
    raise ConfigError(f"TrainConfig.turns: {jax.local_devices()[0]} has no memory of the host, only {sorted(known)}")
