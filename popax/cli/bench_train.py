"""`popax bench train`: the population step against the base alone and against one user after the other."""

import argparse
import sys

from popax.cli.gin_door import BENCH_MODEL, add_arguments, open_door
from popax.cli.main import add_json

NAME = "train"
HELP = "Time the population step against base-only forward + input gradient, and against the users one by one."
EXAMPLE = (
    "popax bench train --json bench_train.json\n"
    "  popax bench train --toy --json toy.json\n"
    "  popax bench train --methods lora lora_xs svf --users 4096 --json methods_train.json"
)


def configure(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    parser.add_argument(
        "--toy", action="store_true", help="also the toy that other servers were timed on, at 64 and 256 adapters"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="time a step of each of these methods instead, in turns, at BenchTrainConfig.adapter's rank and targets "
        "(lora is what the others are compared with); on the toy model where no other is given",
    )
    parser.add_argument(
        "--users",
        type=int,
        default=4096,
        help="of --methods: the population (4096), of one row of at most 64 tokens each",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from popax.bench.report import write_report
    from popax.bench.train import TOY, BenchTrainConfig, bench_toy, bench_train
    from popax.modeling.config import ModelConfig

    door = open_door(args, model=BENCH_MODEL)
    config = door.build(BenchTrainConfig)
    named = args.gin_file or args.gin_param
    model = door.build(ModelConfig) if named or not (args.toy or args.methods) else TOY

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if args.methods:
        return _methods(args, model, config, say)
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


def _methods(args: argparse.Namespace, model, config, say) -> int:
    import dataclasses

    from popax.bench.report import write_report
    from popax.bench.train_methods import bench_methods

    config = dataclasses.replace(config, users=args.users, batch_size=1, seq_len=min(config.seq_len, 64))
    adapters = {name: dataclasses.replace(config.adapter, method=name) for name in args.methods}
    figures, rows = bench_methods(model, config, adapters, progress=say)
    for row in rows:
        sizes = f"state {row['state_bytes'] / 1e6:,.0f} MB, program {row['program_bytes'] / 1e6:,.0f} MB"
        print(
            f"{row['method']:12s} {row['parameters_per_user']:8,d} numbers a user, "
            f"{row['microseconds_per_user']:8.1f} us a user and step, {row['over_lora']:.2f} of lora's, {sizes}"
        )
    if args.json:
        record = {"model": model, "bench": config, "methods": list(adapters)}
        write_report(args.json, name="bench train methods", config=record, figures=figures, rows=rows)
    return 0
