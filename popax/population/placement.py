"""Where a population's members lie: on one device, or in equal blocks along a mesh's axis `population`.

Nothing here moves a member from one block to another: it is made and read where it lies, by processes that hold it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from popax.adapters.cohort import Cohort
from popax.errors import ConfigError
from popax.population.state import PopulationState, population_shardings
from popax.sharding import ShardingRules
from popax.trees import member, set_member

AXIS = "population"
T = TypeVar("T")


class Placement:
    """Slots in `blocks` equal blocks; a block lies on the devices of one index of the axis. mesh None: one block."""

    def __init__(self, slots: int, mesh: Mesh | None = None, rules: ShardingRules | None = None):
        """Raises ConfigError where the slots do not divide into the mesh's blocks."""
        self.mesh, self.rules, self.slots = mesh, rules or ShardingRules(), slots
        self.blocks = 1 if mesh is None else mesh.shape.get(AXIS, 1)
        if slots % self.blocks:
            raise ConfigError(
                f"slots={slots} do not divide over the {self.blocks} blocks of the mesh's population axis: "
                f"set TrainConfig.slots to a multiple of {self.blocks}"
            )
        self.block_size = slots // self.blocks
        # Of each block's devices, and of the processes that have them, the first speaks for it.
        self._devices = [[] for _ in range(self.blocks)]
        if mesh is not None:
            for device, index in self.over_population.devices_indices_map((self.blocks,)).items():
                self._devices[index[0].start or 0].append(device)
        here = jax.process_index()
        self._owned = [not held or min(d.process_index for d in held) == here for held in self._devices]
        self._present = [not held or any(d.process_index == here for d in held) for held in self._devices]
        self._zeros: dict[Any, jax.Array] = {}

    @property
    def over_population(self) -> NamedSharding:
        """Of an array whose first axis is the population's, or the blocks'."""
        assert self.mesh is not None
        return NamedSharding(self.mesh, PartitionSpec(AXIS if AXIS in self.mesh.axis_names else None))

    @property
    def replicated(self) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, PartitionSpec())

    def owns(self, slot: int) -> bool:
        """Whether this process writes the slot's member back. Every slot has exactly one owner."""
        return self._owned[slot // self.block_size]

    def holds(self, slot: int) -> bool:
        """Whether a device of this process holds a part of the slot's member."""
        return self._present[slot // self.block_size]

    @functools.cached_property
    def local_slots(self) -> list[int]:
        """The slots that this process holds, ascending: those whose rows it must have."""
        return [slot for slot in range(self.slots) if self.holds(slot)]

    def local(self, values: Sequence[T]) -> list[T]:
        """Those of the slots' values that belong to `local_slots`."""
        return [values[slot] for slot in self.local_slots]

    def shardings(self, cohort: Cohort, state: PopulationState) -> PopulationState | None:
        """Of every leaf of the state; None without a mesh."""
        return None if self.mesh is None else population_shardings(cohort, state, self.mesh, self.rules)

    def rows(self, local: T) -> T:
        """Leaves of the `local_slots` [n, ...], in their order -> of all slots [N, ...]; a process gives its own."""
        if self.mesh is None:
            return local
        sharding = self.over_population
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(sharding, leaf, (self.slots, *leaf.shape[1:])), local
        )

    def insert_member(self, state: PopulationState, slot: jax.Array, one: PopulationState) -> PopulationState:
        """The state with the member in the slot; compiled. one: what `insertable` gives."""
        if self.mesh is None:
            return set_member(state, slot, one)
        block, place = jnp.divmod(slot, np.int32(self.block_size))
        here = jnp.arange(self.blocks, dtype=jnp.int32) == block

        def put(leaf: jax.Array, new: jax.Array) -> jax.Array:
            blocks = leaf.reshape(self.blocks, self.block_size, *leaf.shape[1:])
            changed = blocks.at[:, place].set(new)
            # Elementwise over the blocks: no device needs another's.
            return jnp.where(here.reshape(-1, *(1,) * (blocks.ndim - 1)), changed, blocks).reshape(leaf.shape)

        return jax.tree.map(put, state, one)

    def insertable(self, slot: int, one: PopulationState | None, like: PopulationState) -> PopulationState:
        """What `insert_member` takes: the member, or with a mesh [blocks, ...] of which the slot's block is the member.

        one: None in a process that does not hold the slot. like: the population's state, for the shapes.
        """
        if self.mesh is None:
            assert one is not None
            return one
        held = set(self._devices[slot // self.block_size])

        def spread(leaf: jax.Array, new: jax.Array | None) -> jax.Array:
            shape = (1, *leaf.shape[1:])
            block = None if new is None else new[None]
            parts = [
                jax.device_put(block, device) if device in held else self._zero(device, shape, leaf.dtype)
                for devices in self._devices
                for device in devices
                if device.process_index == jax.process_index()
            ]
            full = (self.blocks, *shape[1:])
            return jax.make_array_from_single_device_arrays(full, self.over_population, parts)

        leaves, structure = jax.tree.flatten(like)
        members = [None] * len(leaves) if one is None else jax.tree.leaves(one)
        return jax.tree.unflatten(structure, map(spread, leaves, members))

    def gather_member(self, state: Any, slot: jax.Array) -> Any:
        """The slot's member, or with a mesh the member at its place in every block [blocks, ...]; compiled."""
        if self.mesh is None:
            return member(state, slot)
        place = slot % np.int32(self.block_size)
        return jax.tree.map(lambda leaf: leaf.reshape(self.blocks, self.block_size, *leaf.shape[1:])[:, place], state)

    def gathered(self, members: T, slot: int) -> T:
        """The one of `gather_member`'s members that the slot's owner wants, still on its device."""
        if self.mesh is None:
            return members
        held = set(self._devices[slot // self.block_size])
        return jax.tree.map(
            lambda leaf: next(part.data[0] for part in leaf.addressable_shards if part.device in held), members
        )

    def host(self, tree: T) -> T:
        """NumPy leaves, whole in every process: for a few numbers a member, such as metrics."""
        if self.mesh is not None and jax.process_count() > 1:
            tree = self._replicate(tree)
        return jax.tree.map(np.asarray, tree)

    @functools.cached_property
    def _replicate(self) -> Callable[[Any], Any]:
        return jax.jit(lambda tree: tree, out_shardings=self.replicated)

    def _zero(self, device: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        key = (device, shape, dtype)
        if key not in self._zeros:
            self._zeros[key] = jax.device_put(np.zeros(shape, dtype), device)
        return self._zeros[key]
