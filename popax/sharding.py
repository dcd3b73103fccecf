"""Logical axis names -> mesh axes, in one place."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from popax.errors import ConfigError

MeshAxes = str | tuple[str, ...] | None

DEFAULT_RULES: tuple[tuple[str, MeshAxes], ...] = (
    ("population", "population"),
    ("batch", None),
    # The tokens of a row, and the positions of a cache.
    ("sequence", "context"),
    ("layers", None),
    # On a mesh with experts, what is no expert's is spread over their devices too, rather than repeated on each.
    ("embed", ("fsdp", "expert")),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("ffw", "tensor"),
    ("vocab", "tensor"),
    ("expert", "expert"),
    ("expert_ffw", "tensor"),
    ("router", None),
    ("q_latent", ("fsdp", "expert")),
    ("kv_latent", ("fsdp", "expert")),
    ("norm", None),
    ("groups", None),
    ("rank", None),
    ("vector", None),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Which mesh axes shard each logical axis; axes that a mesh lacks are ignored, so one table fits all meshes."""

    rules: tuple[tuple[str, MeshAxes], ...] = DEFAULT_RULES

    def spec(self, axes: Sequence[str | None], mesh: Mesh | AbstractMesh) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes. Raises ConfigError on an unknown logical axis."""
        table = dict(self.rules)
        taken: set[str] = set()
        entries: list[Any] = [None] * len(axes)
        # A mesh axis may shard one dimension of an array only: the first that asks for it gets it, but experts before
        # users, so that adapters on experts lie where the experts do.
        for at in sorted(range(len(axes)), key=lambda at: axes[at] != "expert"):
            axis = axes[at]
            if axis is not None and axis not in table:
                raise ConfigError(f"logical axis {axis!r} has no sharding rule; the rules know {', '.join(table)}")
            wanted = table[axis] if axis is not None else None
            names = (wanted,) if isinstance(wanted, str) else (wanted or ())
            names = tuple(name for name in names if name in mesh.axis_names and name not in taken)
            taken.update(names)
            entries[at] = names[0] if len(names) == 1 else (names or None)
        return PartitionSpec(*entries)

    def sharding(self, axes: Sequence[str | None], mesh: Mesh) -> NamedSharding:
        """`spec` bound to the mesh."""
        return NamedSharding(mesh, self.spec(axes, mesh))


def free_axes(axes: Sequence[str], rules: ShardingRules) -> tuple[str, ...]:
    """The ambient mesh's axes for the last dimension of an array with these logical axes.

    Without those of one device, and those that a caller has cut by hand.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual}
    entry = rules.spec(axes, mesh)[-1]
    names = (entry,) if isinstance(entry, str) else entry or ()
    return tuple(name for name in names if name in free and mesh.shape[name] > 1)


def make_mesh(text: str | None) -> Mesh:
    """A mesh over all devices of all processes: "population=4,fsdp=2", or None for all of them along population.

    The first axis is the slowest: with population first, a process has whole members as far as it can. Raises
    ConfigError for an axis that no rule names, and where the sizes do not multiply to the number of devices.
    """
    known = {name for _, axes in DEFAULT_RULES for name in ((axes,) if isinstance(axes, str) else axes or ())}
    sizes = {}
    for part in (text or f"population={jax.device_count()}").split(","):
        name, _, size = part.strip().partition("=")
        if name not in known or not size.isdigit() or int(size) < 1 or name in sizes:
            raise ConfigError(f"mesh {text!r}: AXIS=SIZE,... with each of {', '.join(sorted(known))} at most once")
        sizes[name] = int(size)
    if (wanted := math.prod(sizes.values())) != jax.device_count():
        raise ConfigError(
            f"mesh {text!r} is of {wanted} devices, there are {jax.device_count()} in {jax.process_count()} processes: "
            "the sizes multiply to their number"
        )
    return Mesh(np.array(jax.devices()).reshape(tuple(sizes.values())), tuple(sizes))


def training_options(mesh: Mesh) -> dict[str, Any] | None:
    """What the compiler of a training step on this mesh is told beside its defaults; None for nothing.

    A TPU's partitioner turns a gather of weights from all devices of a program, and from all only, into a ring of
    partial products. By its own count that reads and writes more, and a step would do more work on one replica of the
    population than on two. The option is a size in MiB that such products have at least: none has so much.
    """
    if mesh.size == 1 or mesh.devices.flat[0].platform != "tpu":
        return None
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1 << 20}


def shard_tree(tree: Any, shardings: Any) -> Any:
    """Put every leaf where its sharding says."""
    return jax.tree.map(jax.device_put, tree, shardings)
