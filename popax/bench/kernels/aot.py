"""Compiling one call for a TPU that is not attached, and reading what the compiler says about it."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from popax.bench.kernels.environment import ENVIRONMENT
from popax.errors import ConfigError
from popax.kernels.op import nbytes
from popax.plan import hlo

VMEM = 1  # as a memory space of a compiled program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted:
    """What the compiler counts for one program on one device, in bytes and operations.

    operand_bytes is the logical size; arguments and temporaries are what the device holds. vmem_bytes: the largest
    scope of a kernel in it, 0 without one. flops and bytes: the compiler's sum, with a kernel's own declaration; bytes
    without staged_bytes, its own copying of operands and results through VMEM, which it does where it finds time for it
    and counts several times over, beside the reader's count.
    """

    operand_bytes: int
    argument_bytes: int
    temporary_bytes: int
    vmem_bytes: int
    flops: int
    bytes: int
    staged_bytes: int

    @property
    def held_over_logical(self) -> float:
        return (self.argument_bytes + self.temporary_bytes) / self.operand_bytes


def require_compiler() -> None:
    """Raises ConfigError, with the fix, where the TPU compiler cannot be reached."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("the TPU compiler is not installed: pip install 'popax[aot]' (the package libtpu)")
    absent = {name: value for name, value in ENVIRONMENT.items() if os.environ.get(name) != value}
    if absent:
        settings = " ".join(f"{name}={value}" for name, value in absent.items())
        raise ConfigError(f"set before Python starts, so that the compiler does not look for a TPU: {settings}")


def one_device(topology: str) -> Mesh:
    """A mesh of the first device of a slice such as "v5e:2x2"."""
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    return Mesh(np.array(devices[:1]), ("population",))


def count(call: Callable[..., Any], operands: tuple[Any, ...], mesh: Mesh, donated: tuple[int, ...] = ()) -> Counted:
    """Compiles call(*operands) for the mesh; operands are trees of jax.ShapeDtypeStruct.

    Raises what the compiler raises, and NotImplementedError where a kernel does not take the shape.
    """
    sharding = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), operands)
    with jax.set_mesh(mesh):
        compiled = jax.jit(call, donate_argnums=donated, keep_unused=True).lower(*placed).compile()
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis() or {}, compiled.as_text() or ""
    assert memory is not None, "the TPU compiler always has an analysis of memory"
    staged = _staged_bytes(hlo.parse(text))
    return Counted(
        operand_bytes=nbytes(operands),
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        vmem_bytes=_vmem_bytes(text),
        flops=int(cost.get("flops", 0)),
        bytes=int(cost.get("bytes accessed", 0)) - staged,
        staged_bytes=staged,
    )


def _vmem_bytes(text: str) -> int:
    """The largest scoped allocation in memory space 1 (VMEM) that a custom call of the program was given."""
    scopes = re.findall(r'"used_scoped_memory_configs":\[([^\]]*)\]', text)
    sizes = [int(size) for scope in scopes for size in re.findall(r'"memory_space":"1"[^}]*"size":"(\d+)"', scope)]
    return max(sizes, default=0)


def _staged_bytes(module: hlo.Module) -> int:
    """What the compiler's sum has for asynchronous copies between HBM and VMEM.

    A whole array counts four times, a slice three times: operands and results of the start and of the done.
    """
    total = 0
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            moved = instruction.shapes
            if instruction.opcode == "copy-start" and any(shape.memory_space == VMEM for shape in moved[:2]):
                total += 4 * moved[0].nbytes
            elif instruction.opcode == "slice-done" and moved[0].memory_space == VMEM:
                total += 3 * moved[0].nbytes
    return total
