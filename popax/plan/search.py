"""Meshes of one slice, tried and ranked."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from popax.errors import ConfigError
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.plan.compiler import Compiled
from popax.plan.config import MeshShape, PlanConfig, StepName
from popax.plan.report import needed_per_chip, roofline

# Of a chip's memory, which the base's shards may take for a mesh to be worth a compile.
MOST_BASE = 0.9


class Candidate(NamedTuple):
    """A mesh with its compiled step; seconds is the roofline's estimate."""

    mesh: MeshShape
    compiled: Compiled
    seconds: float

    def row(self, config: PlanConfig) -> dict[str, Any]:
        return {
            "mesh": str(self.mesh),
            "fits": self.compiled.fits,
            "hbm_bytes_needed": needed_per_chip(config, self.compiled),
            "estimate_seconds": self.seconds if self.compiled.fits else None,
            "compile_s": self.compiled.compile_s,
        }


def meshes(config: PlanConfig, model: ModelConfig, step: StepName) -> Iterator[MeshShape]:
    """Power-of-two splits of the slice in which the base fits and users, or rows, divide; most replicas first."""
    devices, chip = config.slice.devices, config.slice.chip
    base_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(Model(model).abstract()))
    most = MOST_BASE * chip.usable_bytes / chip.devices
    fixed = config.mesh_of(step)
    own = devices // (fixed.expert * fixed.context)
    for population in reversed(_powers(own)):
        for tensor in _powers(own // population):
            fsdp = own // population // tensor
            mesh = dataclasses.replace(fixed, population=population, fsdp=fsdp, tensor=tensor)
            if mesh.devices == devices and base_bytes / (devices / population / fixed.context) <= most:
                try:
                    with_mesh(config, mesh, step)
                except ConfigError:
                    continue  # its users do not divide
                yield mesh


def with_mesh(config: PlanConfig, mesh: MeshShape, step: StepName) -> PlanConfig:
    """The plan of one step on another mesh."""
    return dataclasses.replace(config, mesh=mesh, serving_mesh=None, steps=(step,))


def rank(
    config: PlanConfig,
    model: ModelConfig,
    step: StepName,
    compile_step: Callable[[PlanConfig, StepName], Compiled],
    say: Callable[[str], None],
    most: int,
) -> list[Candidate]:
    """Compiles up to `most` meshes; those that fit first, fastest first by the roofline's estimate."""
    found: list[Candidate] = []
    for mesh in list(meshes(config, model, step))[:most]:
        planned = with_mesh(config, mesh, step)
        try:
            compiled = compile_step(planned, step)
        except ConfigError as error:
            say(f"{mesh}: left out, {error}")
            continue
        found.append(Candidate(mesh, compiled, roofline(planned, compiled).seconds))
    return sorted(found, key=lambda each: (not each.compiled.fits, each.seconds, each.compiled.needed_bytes))


def _powers(limit: int) -> list[int]:
    return [1 << exponent for exponent in range(limit.bit_length()) if limit % (1 << exponent) == 0]
