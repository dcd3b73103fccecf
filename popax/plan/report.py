"""What a compiled step means on a chip: memory against the limit, a roofline, and the figures of a report."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from popax.adapters.cohort import Cohort
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.plan.collectives import DCN, by_axes, crossing
from popax.plan.compiler import Compiled
from popax.plan.config import PlanConfig

GB = 10**9


class Roofline(NamedTuple):
    """Estimates. Each unit alone, at the vendor's peak and perfectly overlapped: seconds is the longest of the three,
    link_s supposes that a chip's links are all used, and has no time for what travels between slices. mfu: FLOPs
    without recomputation over peak x seconds."""

    compute_s: float
    memory_s: float
    link_s: float
    mfu: float

    @property
    def seconds(self) -> float:
        return max(self.compute_s, self.memory_s, self.link_s)

    @property
    def bound(self) -> str:
        return max((self.compute_s, "compute"), (self.memory_s, "memory"), (self.link_s, "links"))[1]


def roofline(config: PlanConfig, compiled: Compiled) -> Roofline:
    """Of one device, which is an equal part of its chip."""
    chip = config.slice.chip
    part = 1 / chip.devices
    compute = compiled.matmul_flops / (chip.peak_flops * part)
    memory = compiled.hbm_bytes / (chip.hbm_bandwidth * part)
    links = sum(size for axes, size in by_axes(compiled.collectives).items() if axes != DCN)
    link = links / (chip.ici_bandwidth * part)
    useful = compiled.matmul_flops - compiled.recomputed_flops
    longest = max(compute, memory, link)
    return Roofline(compute, memory, link, useful / (chip.peak_flops * part * longest) if longest else 0.0)


def chip_bytes(config: PlanConfig, compiled: Compiled) -> dict[str, int]:
    """What a chip holds, by kind; all its devices together. Tiling that adds less than a thousandth is left out."""
    kinds = compiled.argument_bytes | {"temporaries": compiled.temporary_bytes}
    if kinds.get("padding", 0) < compiled.needed_bytes / 1000:
        kinds.pop("padding", None)
    return {kind: size * config.slice.chip.devices for kind, size in kinds.items() if size}


def waiting_bytes(config: PlanConfig, compiled: Compiled) -> int:
    """What a chip's host holds of users who train by turns: the state of every turn."""
    if compiled.step != "train" or config.turns == 1:
        return 0
    state = sum(compiled.argument_bytes.get(kind, 0) for kind in ("adapters", "optimizer"))
    return state * config.slice.chip.devices * config.turns


def needed_per_chip(config: PlanConfig, compiled: Compiled) -> int:
    return compiled.needed_bytes * config.slice.chip.devices


def cross_population_bytes(config: PlanConfig, compiled: Compiled) -> int:
    """Bytes that a device receives along the population axis, between slices too, in one step; scalar metrics apart."""
    users = config.users if compiled.step == "train" else config.slots
    return sum(one.crossed_bytes for axis in ("population", DCN) for one in crossing(compiled.collectives, axis, users))


def figures(config: PlanConfig, model: ModelConfig, steps: Sequence[Compiled]) -> dict[str, Any]:
    """The report's figures: of the step that needs most, where they are of one step."""
    base = Model(model)
    return {
        "topology": config.topology,
        "slices": config.slices,
        "parameters": base.num_params,
        "parameters_per_user": Cohort.of(config.adapter, base.sites()).num_params,
        "chips": config.slice.chips,
        "devices": config.slice.devices,
        "population": config.users * config.turns if "train" in config.steps else config.slots,
        "fits": all(step.fits for step in steps),
        "hbm_per_chip_bytes": max(needed_per_chip(config, step) for step in steps),
        "hbm_limit_bytes": config.slice.chip.usable_bytes,
        "compile_s": max(step.compile_s for step in steps),
        "compile_peak_bytes": max(step.peak_bytes for step in steps),
        "cross_population_adapter_bytes": sum(cross_population_bytes(config, step) for step in steps),
    }


def row(config: PlanConfig, compiled: Compiled) -> dict[str, Any]:
    """One step of the report; every number is of one chip, seconds and mfu are estimates."""
    devices = config.slice.chip.devices
    line: dict[str, Any] = {
        "step": compiled.step,
        "mesh": str(config.mesh_of(compiled.step)),
        "fits": compiled.fits,
        "hbm_bytes_needed": needed_per_chip(config, compiled),
    }
    if not compiled.fits:
        return line | {"refusal": compiled.refusal, "compile_s": compiled.compile_s}
    estimate = roofline(config, compiled)
    return line | {
        **{f"hbm_{kind}_bytes": size for kind, size in chip_bytes(config, compiled).items()},
        **({"host_bytes": waiting} if (waiting := waiting_bytes(config, compiled)) else {}),
        "matmul_flops": compiled.matmul_flops * devices,
        "recomputed_flops": compiled.recomputed_flops * devices,
        "hbm_traffic_bytes": compiled.hbm_bytes * devices,
        "accessed_bytes": compiled.accessed_bytes * devices,
        "collective_bytes": {axes: size * devices for axes, size in by_axes(compiled.collectives).items()},
        "estimate_seconds": estimate.seconds,
        "estimate_bound": estimate.bound,
        "estimate_mfu": estimate.mfu,
        "compile_s": compiled.compile_s,
        "compile_cpu_s": compiled.cpu_s,
        "compile_peak_bytes": compiled.peak_bytes,
    }


def lines(config: PlanConfig, compiled: Compiled) -> Iterator[str]:
    """One step for the terminal."""
    limit, needed = config.slice.chip.usable_bytes, needed_per_chip(config, compiled)
    mesh = config.mesh_of(compiled.step)
    verdict = "fits" if compiled.fits else "DOES NOT FIT"
    yield ""
    yield f"{compiled.step} step on {config.where}, {mesh}: {verdict}"
    yield f"  HBM per chip      {needed / GB:10.2f} GB of {limit / GB:.2f} GB"
    for kind, size in chip_bytes(config, compiled).items():
        yield f"    {kind:15s} {size / GB:10.3f} GB"
    if waiting := waiting_bytes(config, compiled):
        users = f"{config.users * config.turns} users in {config.turns} turns"
        yield f"  host, per chip    {waiting / GB:10.3f} GB of {users}"
    if compiled.fits:
        yield from _work_lines(config, compiled)
    else:
        yield f"  {compiled.refusal}"
    yield (
        f"  compiled in {compiled.compile_s:.0f} s ({compiled.cpu_s:.0f} s of processor time), "
        f"{compiled.peak_bytes / GB:.2f} GB at most"
    )


def _work_lines(config: PlanConfig, compiled: Compiled) -> Iterator[str]:
    devices, estimate = config.slice.chip.devices, roofline(config, compiled)
    yield f"  matrix FLOPs      {compiled.matmul_flops * devices / 1e12:10.3f} T a chip and step"
    yield f"  HBM traffic       {compiled.hbm_bytes * devices / GB:10.3f} GB a chip and step"
    for axes, size in by_axes(compiled.collectives).items():
        yield f"  over {axes:12s} {size * devices / GB:10.3f} GB received a chip and step"
    crossed = cross_population_bytes(config, compiled)
    yield f"  adapter bytes across the population axis: {crossed}"
    yield (
        f"  estimate: {estimate.seconds * 1e3:.3g} ms a step, bound by {estimate.bound} (compute "
        f"{estimate.compute_s * 1e3:.3g}, memory {estimate.memory_s * 1e3:.3g}, links {estimate.link_s * 1e3:.3g} ms); "
        f"MFU estimate {estimate.mfu:.0%}"
    )
