"""`popax bench curve`: the Scale Down curve."""

import argparse
import sys
import time

from popax.cli.bench_users import WIRING, configure_users, opened_users
from popax.cli.gin_door import GinDoor

NAME = "curve"
HELP = "Train the same users with each method, seeds and learning rates as members; held-out gain against bytes a user."
EXAMPLE = (
    "popax bench curve --gin_file configs/runs/scale_down_curve.gin --base runs/irc_base/base "
    "--data messages.jsonl.gz --users_with_at_least 100 --json curve.json --picture curve.png"
)


def configure(parser: argparse.ArgumentParser) -> None:
    configure_users(parser)
    parser.add_argument("--picture", metavar="PATH", help="write a PNG")


def run(args: argparse.Namespace) -> int:
    from popax.bench.curve.choice import choices, figures_of
    from popax.bench.curve.config import CurveConfig
    from popax.bench.curve.picture import draw_curve
    from popax.bench.curve.run import bench_curve
    from popax.bench.report import write_report
    from popax.evaluation.columns import EvalConfig
    from popax.training.config import TrainConfig

    started, door = time.monotonic(), GinDoor([WIRING, *args.gin_file], args.gin_param)
    config = door.build(CurveConfig)
    train, evaluation = door.build(TrainConfig), door.build(EvalConfig)
    rows: list[dict] = []

    with opened_users(args, door, config.users, f"{config.users} (CurveConfig.users)") as on:

        def report() -> None:
            figures = {**figures_of(rows), "seconds": time.monotonic() - started}
            record = {
                "curve": config,
                "train": train,
                "data": on.pipeline.config,
                "evaluation": evaluation,
                "base": on.base.digest,
            }
            if args.json:
                write_report(args.json, name="bench curve", config=record, figures=figures, rows=rows)
            if args.picture:
                draw_curve(rows, args.picture)

        say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
        try:
            for made in bench_curve(*on, config, train, evaluation, progress=say):
                rows += made
                report()  # whole after every method
        except KeyboardInterrupt:
            done = len(choices(rows))
            raise KeyboardInterrupt(f"{done} methods are in {args.json or 'no report (--json)'}") from None
    print(f"{'method':34s} {'bytes':>10s} {'gain':>8s} {'others':>8s} {'rate':>6s} {'at its own':>11s}")
    for method, choice in sorted(choices(rows).items(), key=lambda item: -item[1].bytes):
        own = "" if choice.own_S is None else f"{choice.own_S.mean():+11.4f}"
        gain, lost = choice.gain_S.mean(), choice.lost_S.mean()
        print(f"{method:34s} {choice.bytes:10,d} {gain:+8.4f} {-lost:+8.4f} {choice.rate:6g} {own}")
    return 0
