"""`popax bench residency`: requests through device slots, the host tier and the catalog."""

import argparse
import os
import sys
from pathlib import Path

from popax.cli.gin_door import BENCH_MODEL, add_arguments, open_door
from popax.cli.main import add_json

NAME = "residency"
HELP = "Send a trace of requests through slots and host tier: hit rates beside a simulated LRU's, answers checked."
EXAMPLE = "popax bench residency --json bench_residency.json"


def configure(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    parser.add_argument("--users", type=int, metavar="N", help="in the catalog (default: BenchResidencyConfig.users)")
    parser.add_argument("--place", metavar="DIRECTORY", help="keep the catalog there, and use it again")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from popax.bench.host_memory import share_arenas

    share_arenas()
    from popax.bench.report import write_report
    from popax.bench.residency import BenchResidencyConfig, bench_residency
    from popax.modeling.config import ModelConfig

    door = open_door(args, model=BENCH_MODEL)
    overrides = {} if args.users is None else {"users": args.users}
    model, config = door.build(ModelConfig), door.build(BenchResidencyConfig, **overrides)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    figures = bench_residency(model, config, place=Path(args.place) if args.place else None, say=say)
    for name, value in figures.items():
        print(f"{name:28s} {value:.4g}" if isinstance(value, float) else f"{name:28s} {value}")
    if args.json:
        write_report(args.json, name="bench residency", config={"model": model, "bench": config}, figures=figures)
    return 0
