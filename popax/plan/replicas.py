"""The same step on more replicas of the population: users are independent, so a device's work must not grow."""

import dataclasses
from collections.abc import Sequence

from popax.plan.compiler import Compiled
from popax.plan.config import MeshShape, PlanConfig, StepName

# What a device holds, computes, reads and writes, none of which may depend on how many replicas there are. Not the
# traffic of HBM: what the compiler keeps in VMEM, and when it fetches it, follows the times that it expects of the
# collectives. It differs between slices of other shapes for programs that are the same to the byte.
COMPARED = ("needed_bytes", "matmul_flops", "accessed_bytes")
TOLERANCE = 0.02


def replicated(config: PlanConfig, step: StepName, times: int) -> PlanConfig:
    """The plan of one step with `times` as many replicas, users, slots and rows, on slices of as many chips."""

    def wider(mesh: MeshShape) -> MeshShape:
        return dataclasses.replace(mesh, population=mesh.population * times)

    counts = ("users", "slots", "prefill_rows", "decode_rows")
    return dataclasses.replace(
        config,
        topology=config.slice.larger(times).name,
        mesh=wider(config.mesh),
        serving_mesh=None if config.serving_mesh is None else wider(config.serving_mesh),
        steps=(step,),
        **{name: getattr(config, name) * times for name in counts},
    )


def growth(one: Compiled, more: Sequence[Compiled], compared: Sequence[str] = COMPARED) -> float:
    """The largest relative difference between a device of the first and of the others; inf where one does not fit."""
    if not all(step.fits for step in (one, *more)):
        return float("inf")
    pairs = ((getattr(one, name), getattr(step, name)) for step in more for name in compared)
    return max((abs(other - first) / max(first, 1) for first, other in pairs), default=0.0)
