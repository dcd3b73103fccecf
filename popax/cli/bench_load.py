"""`popax bench load`: a process's shard of a base, loaded from a Hugging Face directory of random weights."""

import argparse
import os
import sys
from pathlib import Path

from popax.cli.gin_door import BENCH_MODEL, add_arguments, open_door
from popax.cli.main import add_json

NAME = "load"
HELP = "Time loading one process's shard of a base against reading as many bytes, and measure the host memory it takes."
EXAMPLE = (
    "popax bench load --gin_file configs/models/qwen3_8b.gin --json bench_load.json\n"
    "  popax bench load --gin_file configs/models/qwen3_8b.gin --gin_param ModelConfig.num_layers=4"
)


def configure(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    parser.add_argument(
        "--place",
        metavar="DIRECTORY",
        help="where the weights are written, and removed again (default: temporary files)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from popax.bench.load import BenchLoadConfig, bench_load
    from popax.bench.report import write_report
    from popax.modeling.config import ModelConfig

    door = open_door(args, model=BENCH_MODEL)
    model, config = door.build(ModelConfig), door.build(BenchLoadConfig)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    figures, rows = bench_load(model, config, place=Path(args.place) if args.place else None, progress=say)
    for name, value in figures.items():
        print(f"{name:28s} {value:.4g}" if isinstance(value, float) else f"{name:28s} {value}")
    if args.json:
        write_report(args.json, name="bench load", config={"model": model, "bench": config}, figures=figures, rows=rows)
    return 0
