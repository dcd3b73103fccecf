"""`popax bench serve`: mixed users against the base alone, Zipf traces, cold users, churn."""

import argparse

from popax.cli.gin_door import BENCH_SERVE, add_arguments, open_door
from popax.cli.main import add_json

NAME = "serve"
HELP = "Serve many users under load: decoding beside the base alone, Zipf traces, cold users' effect, churn and leaks."
EXAMPLE = "popax bench serve --json bench_serve.json"


def configure(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from popax.bench.report import write_report
    from popax.bench.serve.config import BenchServeConfig
    from popax.bench.serve.run import bench_serve
    from popax.modeling.config import ModelConfig
    from popax.serving.programs import EngineShapes

    door = open_door(args, model=BENCH_SERVE)
    model, config, shapes = door.build(ModelConfig), door.build(BenchServeConfig), door.build(EngineShapes)
    figures = bench_serve(model, config, shapes)
    for name, value in figures.items():
        print(f"{name:28s} {value:.4g}" if isinstance(value, float) else f"{name:28s} {value}")
    if args.json:
        record = {"model": model, "bench": config, "shapes": shapes}
        write_report(args.json, name="bench serve", config=record, figures=figures, rows=[])
    return 0
