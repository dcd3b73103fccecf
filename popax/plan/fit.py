"""How large a population, or a served batch, a slice holds; and what to change where it does not hold the asked one."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from popax.modeling.config import ModelConfig
from popax.plan.compiler import Compiled
from popax.plan.config import PlanConfig, StepName

GB = 10**9
Compile = Callable[[PlanConfig, StepName], Compiled]
ATTEMPTS = 6
# What scales with the step's size, and by which of the plan's numbers.
SCALED: dict[StepName, str] = {"train": "users", "prefill": "prefill_rows", "decode": "decode_rows"}
FIXED = ("base", "shared")


class Largest(NamedTuple):
    """The compiler accepted `count` (verified), or nothing that was tried. compiles: how many it took."""

    step: StepName
    name: str
    count: int
    verified: bool
    compiles: int


def unit(config: PlanConfig, step: StepName) -> int:
    """The number of users, or rows, must be a multiple of this: the devices over which they are spread."""
    axes = config.users_over if step == "train" else config.rows_over
    return math.prod(config.mesh_of(step).sizes[axis] for axis in axes)


def guess(config: PlanConfig, compiled: Compiled) -> int:
    """An estimate from one compile: everything but the base (and, in serving, the slots) grows with the count."""
    fixed = sum(compiled.argument_bytes.get(kind, 0) for kind in FIXED)
    if compiled.step != "train":
        fixed += compiled.argument_bytes.get("adapters", 0)
    limit = config.slice.chip.usable_bytes / config.slice.chip.devices
    count = getattr(config, SCALED[compiled.step])
    return _down(count * max(0.0, limit - fixed) / max(1, compiled.needed_bytes - fixed), unit(config, compiled.step))


def largest(config: PlanConfig, compiled: Compiled, compile_step: Compile) -> Largest:
    """The linear model of two compiles, its answer compiled too; fewer are tried where the compiler refuses that."""
    step, name = compiled.step, SCALED[compiled.step]
    one, count = unit(config, step), getattr(config, name)
    limit = config.slice.chip.usable_bytes / config.slice.chip.devices
    other = max(one, guess(config, compiled))
    if other == count:
        other = count + one
    second = compile_step(dataclasses.replace(config, **{name: other}), step)
    slope = (second.needed_bytes - compiled.needed_bytes) / (other - count)
    fixed = compiled.needed_bytes - slope * count
    known = {count: compiled, other: second}
    wanted = _down((limit - fixed) / slope, one) if slope > 0 else 0
    for attempt in range(ATTEMPTS):
        best = max((size for size, result in known.items() if result.fits), default=0)
        refused = min((size for size, result in known.items() if not result.fits), default=None)
        if attempt == 1:
            wanted = _down(wanted * 0.95, one)
        if attempt > 1 or wanted <= best or wanted in known:
            # The line was wrong: halve what is left between the most that fits and the least that does not.
            if refused is None or refused - best <= max(one, 0.05 * best):
                break
            wanted = best + max(one, _down((refused - best) / 2, one))
        known[wanted] = compile_step(dataclasses.replace(config, **{name: wanted}), step)
        if known[wanted].fits and attempt < 2 and (refused is None or wanted > 0.9 * refused):
            break
    best = max((size for size, result in known.items() if result.fits), default=0)
    return Largest(step=step, name=name, count=best, verified=best > 0, compiles=len(known) - 1)


def advice(config: PlanConfig, model: ModelConfig, compiled: Compiled) -> Iterator[str]:
    """What would bring a step that does not fit nearer to the limit, with what each change saves a chip."""
    devices = config.slice.chip.devices
    limit, needed = config.slice.chip.usable_bytes, compiled.needed_bytes * devices
    kinds = {kind: size * devices for kind, size in compiled.argument_bytes.items()}
    base, name = kinds.get("base", 0), SCALED[compiled.step]
    count, mesh = getattr(config, name), config.mesh_of(compiled.step)
    yield f"{compiled.step}: {(needed - limit) / GB:.2f} GB too much a chip. Each of these alone:"
    if base > limit:
        yield f"  no step fits without the base: at least {-(-base * config.slice.chips // limit)} chips for it alone"
    yield f"  twice the fsdp ({mesh.fsdp * 2}, on twice the chips or at half the population): {-base / 2 / GB:+.2f} GB"
    if model.param_dtype == "bfloat16" and model.quantise is None:
        yield f"  ModelConfig.quantise = 'int8': about {-base / 2 / GB:+.2f} GB"
    fewer = guess(config, compiled)
    if unit(config, compiled.step) <= fewer < count:
        yield f"  {name}={fewer} instead of {count}: fits (estimate: all but the base grows with it)"
    elif fewer < unit(config, compiled.step):
        yield f"  fewer than {name}={count} alone does not help: the base leaves {(limit - base) / GB:.2f} GB"
    if compiled.step == "train" and config.remat != "full":
        yield f"  PlanConfig.remat = 'full': of the {model.num_layers} layers only the inputs stay in memory"
    own = kinds.get("adapters", 0) + kinds.get("optimizer", 0)
    if config.adapter.dtype == "float32" and own:
        yield f"  AdapterConfig.dtype = 'bfloat16', moments with it: {-own / 2 / GB:+.2f} GB"
    if compiled.step == "decode":
        yield f"  cache_length={config.cache_length // 2}: {-kinds.get('cache', 0) / 2 / GB:+.2f} GB"


def _down(value: float, multiple: int) -> int:
    return int(value // multiple * multiple)
