"""`popax bench train`: the population step against the base alone and against one user after the other."""

import argparse
import sys

from popax.cli.gin_door import add_arguments, open_door
from popax.cli.main import add_json

NAME = "train"
HELP = "Time the population step against base-only forward + input gradient, and against the users one by one."
EXAMPLE = (
    "popax bench train --gin_file configs/models/bench_25m.gin --json bench_train.json\n"
    "  popax bench train --toy --json toy.json"
)


def configure(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    parser.add_argument(
        "--toy", action="store_true", help="also the toy that other servers were timed on, at 64 and 256 adapters"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from popax.bench.report import write_report
    from popax.bench.train import TOY, BenchTrainConfig, bench_toy, bench_train
    from popax.modeling.config import ModelConfig

    door = open_door(args)
    config = door.build(BenchTrainConfig)
    named = args.gin_file or args.gin_param
    model = door.build(ModelConfig) if named or not args.toy else TOY

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    # The toy first: its first step is timed in a process that has compiled nothing yet.
    toy = bench_toy(progress=say) if args.toy else {}
    figures, rows = bench_train(model, config, progress=say)
    figures |= toy
    for name, value in figures.items():
        print(f"{name:28s} {value:.4g}" if isinstance(value, float) else f"{name:28s} {value}")
    if args.json:
        write_report(
            args.json, name="bench train", config={"model": model, "bench": config}, figures=figures, rows=rows
        )
    return 0
