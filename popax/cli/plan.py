"""`popax plan`: what a step will need on TPUs that are not attached, by the real compiler."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from popax.cli.gin_door import GinDoor, add_arguments
from popax.cli.main import add_json
from popax.errors import ConfigError, PopaxError

NAME = "plan"
HELP = (
    "Compile train, prefill and decode steps for a TPU slice that is not attached, and report what they will need. "
    "Needs the TPU compiler (pip install 'popax[aot]'), no TPU. GPU topologies cannot be compiled without a GPU."
)
EXAMPLE = (
    "popax plan --gin_file configs/runs/plan_qwen3_8b_v5e.gin --json plan.json --picture plan.png\n"
    "  popax plan --gin_file configs/models/qwen3_8b.gin --gin_param 'PlanConfig.topology=\"v5p:2x2x1\"' \\\n"
    "      --gin_param 'MeshShape.fsdp=4' --largest"
)
# Makes mesh, adapter and optimizer reachable by their own keys: `MeshShape.fsdp = 4`.
WIRING = "configs/runs/plan.gin"
# Figures and rows of a report.
Result = tuple[dict[str, Any], list[dict[str, Any]]]


def configure(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    parser.add_argument(
        "--largest", action="store_true", help="also find the largest population and batch that fit (more compiles)"
    )
    parser.add_argument(
        "--replicas",
        type=int,
        metavar="N",
        nargs="+",
        default=[],
        help="also compile the first step on N times the replicas of the population, for each N (2 4): a chip's "
        "memory and work must stay the same",
    )
    parser.add_argument(
        "--search",
        type=int,
        metavar="N",
        nargs="?",
        const=8,
        help="try up to N meshes (8) for the first step; rank them",
    )
    parser.add_argument("--picture", metavar="PATH", help="write a PNG of the memory of a chip in each step")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    # This process only asks for shapes; a chip on this machine is somebody else's.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from popax.bench.report import write_report
    from popax.modeling.config import ModelConfig
    from popax.plan.child import compile_apart
    from popax.plan.compiler import Compiled
    from popax.plan.config import PlanConfig, StepName

    door = GinDoor([WIRING, *args.gin_file], args.gin_param)
    model, config = door.build(ModelConfig), door.build(PlanConfig)

    def compile_step(planned: PlanConfig, step: StepName) -> Compiled:
        say(f"{step} step on {planned.where}, {planned.mesh_of(step)}: compiling")
        return compile_apart(planned, model, step, say)

    figures, rows = (_search if args.search is not None else _plan)(args, config, model, compile_step)
    if args.json:
        write_report(args.json, name=NAME, config={"model": model, "plan": config}, figures=figures, rows=rows)
        print(f"wrote {args.json}")
    good = figures.get("fits", True) and figures.get("replicas_independent", True)
    return 0 if good else PopaxError.exit_code


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _search(args: argparse.Namespace, config: Any, model: Any, compile_step: Callable[..., Any]) -> Result:
    """Other meshes of the slice for the first step."""
    from popax.plan.search import rank

    step = config.steps[0]
    rows = [candidate.row(config) for candidate in rank(config, model, step, compile_step, say, args.search)]
    if not rows:
        raise ConfigError(f"no mesh of {config.where} holds the base and divides the plan's users and rows")
    print(f"{step} step, fastest first by the roofline's estimate")
    for place, line in enumerate(rows, 1):
        needed = f"{line['hbm_bytes_needed'] / 1e9:8.2f} GB a chip"
        verdict = f"{line['estimate_seconds'] * 1e3:9.3g} ms" if line["fits"] else "does not fit"
        print(f"{place:3d}  {line['mesh']:40s} {needed}  {verdict}")
    return {"candidates": len(rows), "best_mesh": rows[0]["mesh"]}, rows


def _plan(args: argparse.Namespace, config: Any, model: Any, compile_step: Callable[..., Any]) -> Result:
    """Every step of the plan, and what was asked about it."""
    from popax.adapters.cohort import Cohort
    from popax.modeling.model import Model
    from popax.plan.fit import SCALED, advice, guess, largest
    from popax.plan.picture import draw_memory
    from popax.plan.replicas import replicated
    from popax.plan.report import chip_bytes, figures, lines, row

    # A number of replicas that cannot be is refused before anything is compiled.
    replicas = {times: replicated(config, config.steps[0], times) for times in args.replicas}
    base = Model(model)
    print(f"{base.num_params:,} parameters, {Cohort.of(config.adapter, base.sites()).num_params:,} a user")
    steps, more = [], {}
    for step in config.steps:
        compiled = compile_step(config, step)
        steps.append(compiled)
        print("\n".join(lines(config, compiled)), flush=True)
        if not compiled.fits:
            print("\n".join(advice(config, model, compiled)))
        if args.largest:
            answer = largest(config, compiled, compile_step)
            more[f"largest_{answer.name}"] = answer.count
            print(f"  largest that fits: {answer.name}={answer.count}, compiled ({answer.compiles} more compiles)")
        elif compiled.fits:
            print(f"  largest that fits: about {SCALED[step]}={guess(config, compiled)}, an estimate; see --largest")
    rows = [row(config, compiled) for compiled in steps]
    if args.replicas:
        found, replica_rows = _replicas(replicas, steps[0], compile_step)
        rows, more = rows + replica_rows, more | found
    named = {"run": Path(args.gin_file[-1]).stem} if args.gin_file else {}
    written: dict[str, Any] = named | figures(config, model, steps) | more
    if args.picture:
        held = {compiled.step: chip_bytes(config, compiled) for compiled in steps}
        title = f"{written['parameters'] / 1e9:.1f}B parameters on {config.where}"
        Path(args.picture).parent.mkdir(parents=True, exist_ok=True)
        draw_memory(held, written["hbm_limit_bytes"], title, Path(args.picture))
        print(f"wrote {args.picture}")
    return written, rows


def _replicas(plans: dict[int, Any], one: Any, compile_step: Callable[..., Any]) -> Result:
    """The first step on more replicas of the population."""
    from popax.plan.replicas import TOLERANCE, growth
    from popax.plan.report import cross_population_bytes, lines, row

    rows, more, crossed = [], [], 0
    for times, planned in plans.items():
        compiled = compile_step(planned, one.step)
        print("\n".join(lines(planned, compiled)), flush=True)
        more.append(compiled)
        crossed += cross_population_bytes(planned, compiled)
        rows.append(row(planned, compiled) | {"replicas": times, "topology": planned.topology})
    grown, traffic = growth(one, more), growth(one, more, ("hbm_bytes",))
    independent = grown <= TOLERANCE and not crossed
    verdict = "independent" if independent else "NOT INDEPENDENT"
    print(
        f"\nreplicas of the population: {verdict}; a chip's memory, FLOPs and accessed bytes differ by {grown:.2%} at "
        f"most, adapter bytes across the population axis: {crossed}; traffic of HBM, with what the compiler keeps in "
        f"VMEM, by {traffic:.2%}"
    )
    return {
        "replicas": list(plans),
        "replicas_growth": grown,
        "replicas_hbm_traffic_growth": traffic,
        "replicas_cross_population_adapter_bytes": crossed,
        "replicas_independent": independent,
    }, rows
