"""`popax bench soak`: a server and clients that are killed, for ten minutes."""

import argparse

from popax.cli.gin_door import BENCH_SERVE, add_arguments, open_door
from popax.cli.main import add_json

NAME = "soak"
HELP = "Serve at a part of capacity while clients are killed and slots run short; errors and latencies."
EXAMPLE = "popax bench soak --json bench_soak.json"


def configure(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from popax.bench.report import write_report
    from popax.bench.serve.soak import BenchSoakConfig, bench_soak
    from popax.modeling.config import ModelConfig

    door = open_door(args, model=BENCH_SERVE)
    model, config = door.build(ModelConfig), door.build(BenchSoakConfig)
    flags = [text for name in args.gin_file for text in ("--gin_file", name)]
    flags += [text for value in args.gin_param for text in ("--gin_param", value)]
    figures = bench_soak(model, config, flags)
    for name, value in figures.items():
        print(f"{name:28s} {value:.4g}" if isinstance(value, float) else f"{name:28s} {value}")
    if args.json:
        record = {"model": model, "bench": config}
        write_report(args.json, name="bench soak", config=record, figures=figures, rows=[])
    return 0
