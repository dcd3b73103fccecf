"""Compiling one step in this process, in the environment that `popax.plan.child` sets, and reading the result."""

import contextlib
import re
import resource
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from popax.errors import ConfigError
from popax.modeling.config import ModelConfig
from popax.plan import costs
from popax.plan.collectives import Collective, collectives
from popax.plan.config import PlanConfig, StepName
from popax.plan.hlo import parse
from popax.plan.steps import StepBuilder
from popax.sharding import training_options

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Compiled(NamedTuple):
    """One step on one device, in bytes and operations. argument_bytes: by kind, as the device holds them.

    fits: whether the compiler accepted it and what it needs is within the limit; where it was not accepted,
    needed_bytes is what it asked for, and there is no program to count in. compile_s, cpu_s, peak_bytes: the compiling
    process's wall time, its processor time on all cores together, and its largest memory.
    """

    step: StepName
    fits: bool
    needed_bytes: int
    argument_bytes: dict[str, int]
    temporary_bytes: int
    matmul_flops: int
    recomputed_flops: int
    hbm_bytes: int
    accessed_bytes: int
    collectives: list[Collective]
    compile_s: float
    cpu_s: float
    peak_bytes: int
    refusal: str


def plan_mesh(config: PlanConfig, step: StepName) -> Mesh:
    """The step's mesh over the slices' devices in their own order. Raises ConfigError where the compiler lacks one."""
    try:
        devices = topologies.get_topology_desc(config.topology, platform="tpu", num_slices=config.slices).devices
    except Exception as error:  # the compiler's client raises its own types
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"topology {config.topology!r}: the TPU compiler refuses it: {reason}") from error
    sizes = config.mesh_of(step).sizes
    if len(devices) != config.slice.devices:
        raise ConfigError(f"{config.where} shows {len(devices)} devices, {config.slice.devices} were expected")
    # The population is the outermost axis: whole slices follow each other along it.
    slices = [getattr(device, "slice_index", 0) for device in devices]
    assert slices == sorted(slices)
    return Mesh(np.array(devices).reshape(tuple(sizes.values())), tuple(sizes))


def compile_step(config: PlanConfig, model: ModelConfig, step: StepName) -> Compiled:
    """Raises ConfigError where shapes and mesh do not fit each other; a step that is too large is a result."""
    started, mesh = time.monotonic(), plan_mesh(config, step)
    built = StepBuilder.of(config, model, mesh).build(step)
    arguments = {kind: device_bytes(tree) for kind, tree in built.operands.items()}
    alone, limit = sum(arguments.values()), config.slice.chip.usable_bytes // config.slice.chip.devices
    if alone > limit:
        reason = f"not compiled: the arguments alone have {alone} bytes on a device, which holds {limit}"
        return _refused(step, started, arguments, alone, reason)
    with jax.set_mesh(mesh):
        jitted = jax.jit(built.call, donate_argnums=built.donated, out_shardings=built.results)
        lowered = jitted.lower(*built.operands.values())
        try:
            compiled = lowered.compile(training_options(mesh) if step == "train" else None)
        except jax.errors.JaxRuntimeError as error:
            needed = needed_bytes(str(error))
            if needed is None:
                raise
            return _refused(step, started, arguments, needed, str(error).splitlines()[0][:300])
    seconds, memory = time.monotonic() - started, compiled.memory_analysis()
    assert memory is not None, "the TPU compiler always has an analysis of memory"
    module = parse(compiled.as_text() or "")
    counted = costs.count(module, expected_rows(model, config.mesh_of(step).expert))
    # Results that take the place of donated arguments cost nothing more.
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporary = memory.temp_size_in_bytes + max(0, fresh) + memory.generated_code_size_in_bytes
    needed = memory.argument_size_in_bytes + temporary
    refusal = too_much(needed, limit)
    return Compiled(
        step=step,
        fits=not refusal,
        needed_bytes=needed,
        argument_bytes=_as_held(arguments, memory.argument_size_in_bytes),
        temporary_bytes=temporary,
        matmul_flops=counted.matmul_flops,
        recomputed_flops=counted.recomputed_flops,
        hbm_bytes=counted.hbm_bytes,
        accessed_bytes=counted.accessed_bytes,
        collectives=collectives(module, config.mesh_of(step).of_one(config.slices).sizes),
        compile_s=seconds,
        cpu_s=time.process_time(),
        peak_bytes=peak_bytes(),
        refusal=refusal,
    )


def too_much(needed: int, limit: int) -> str:
    """Why a compiled step does not fit, or "": the compiler lets more pass than a device is sure to hold."""
    if needed <= limit:
        return ""
    return f"accepted by the compiler, but arguments and temporaries have {needed} bytes on a device, of {limit}"


def _refused(step: StepName, started: float, arguments: dict[str, int], needed: int, reason: str) -> Compiled:
    return Compiled(
        step=step,
        fits=False,
        needed_bytes=needed,
        argument_bytes=arguments,
        temporary_bytes=max(0, needed - sum(arguments.values())),
        matmul_flops=0,
        recomputed_flops=0,
        hbm_bytes=0,
        accessed_bytes=0,
        collectives=[],
        compile_s=time.monotonic() - started,
        cpu_s=time.process_time(),
        peak_bytes=peak_bytes(),
        refusal=reason,
    )


def expected_rows(model: ModelConfig, expert_devices: int) -> float:
    """Of the rows that a device keeps for its experts, which is room for every token's K copies (or as many as it has
    experts), the part that an even routing fills: K E_local / E a token."""
    if model.moe is None:
        return 1.0
    chosen, local = model.moe.experts_per_token, model.moe.num_experts / expert_devices
    return chosen * local / model.moe.num_experts / min(chosen, local)


def device_bytes(tree: Any) -> int:
    """Logical bytes of a tree's shards on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * _item_bytes(leaf.dtype)
        for leaf in jax.tree.leaves(tree)
    )


def _item_bytes(dtype: Any) -> int:
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def _as_held(arguments: dict[str, int], held: int) -> dict[str, int]:
    """The kinds, and what the device's tiling adds to all of them together."""
    padding = held - sum(arguments.values())
    return arguments | ({"padding": padding} if padding > 0 else {})


def needed_bytes(message: str) -> int | None:
    """What a refused program wanted, from the compiler's message; None where the message is about something else."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", message) or re.search(r"\(([\d.]+)([KMGT]?)\) exceeds", message)
    if found is None or "hbm" not in message.lower():
        return None
    return int(float(found.group(1)) * UNITS[found.group(2)])


def peak_bytes() -> int:
    """This process's largest resident memory. Linux keeps it for the program that runs now; getrusage, also for those
    that the process ran before, its parent's copy among them."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found.group(1)) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
