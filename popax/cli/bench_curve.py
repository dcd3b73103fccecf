"""`popax bench curve`: the Scale Down curve."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from popax.cli.base import add_base, base_of
from popax.cli.eval import add_data
from popax.cli.gin_door import GinDoor, add_arguments
from popax.cli.main import add_json

NAME = "curve"
HELP = "Train the same users with each method, seeds and learning rates as members; held-out gain against bytes a user."
EXAMPLE = (
    "popax bench curve --gin_file configs/runs/scale_down_curve.gin --base runs/irc_base/base "
    "--data messages.jsonl.gz --users_with_at_least 100 --json curve.json --picture curve.png"
)
WIRING = "configs/runs/population.gin"


def configure(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    add_base(parser, "a Hugging Face or popax base", serves=False)
    add_data(parser)
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer's path, or byte (default: the base's)")
    parser.add_argument("--users_with_at_least", type=int, default=0, metavar="N", help="only users with N examples")
    parser.add_argument("--picture", metavar="PATH", help="write a PNG")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from popax.bench.curve.config import CurveConfig
    from popax.bench.curve.picture import draw_curve
    from popax.bench.curve.run import bench_curve, chosen, figures_of
    from popax.bench.report import write_report
    from popax.data.pipeline import PipelineConfig, UserPipeline
    from popax.data.records import Columns
    from popax.data.tokenize import load_tokenizer
    from popax.errors import DataError
    from popax.evaluation.columns import EvalConfig
    from popax.training.config import TrainConfig
    from popax.training.inputs import check_fits, open_users, select_users

    started, door = time.monotonic(), GinDoor([WIRING, *args.gin_file], args.gin_param)
    config, data, columns = door.build(CurveConfig), door.build(PipelineConfig), door.build(Columns)
    train, evaluation = door.build(TrainConfig), door.build(EvalConfig)
    base, tokenizer = base_of(args), load_tokenizer(args.tokenizer or args.base)
    check_fits(base.model, tokenizer, data.seq_len)
    rows: list[dict] = []

    def report() -> None:
        figures = {**figures_of(rows), "seconds": time.monotonic() - started}
        record = {"curve": config, "train": train, "data": data, "evaluation": evaluation, "base": base.digest}
        if args.json:
            write_report(args.json, name="bench curve", config=record, figures=figures, rows=rows)
        if args.picture:
            draw_curve(rows, args.picture)

    with tempfile.TemporaryDirectory() as scratch:
        dataset = open_users(args.data, Path(scratch), columns)
        users = select_users(dataset, at_least=args.users_with_at_least)[: config.users]
        if len(users) < config.users:
            raise DataError(f"the data has {len(users)} such users, CurveConfig.users asks for {config.users}")
        pipeline = UserPipeline(dataset, tokenizer, data)
        say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
        try:
            for made in bench_curve(base, pipeline, users, config, train, evaluation, progress=say):
                rows += made
                report()  # whole after every method
        except KeyboardInterrupt:
            done = len(chosen(rows)) if rows else 0
            raise KeyboardInterrupt(f"{done} methods are in {args.json or 'no report (--json)'}") from None
    print(f"{'method':34s} {'bytes':>10s} {'gain':>8s} {'others':>8s}  best rate")
    for method, same in sorted(chosen(rows).items(), key=lambda item: -item[1][0]["bytes"]):
        gain, lost = (sum(row[name] for row in same) / len(same) for name in ("gain", "forgetting"))
        print(f"{method:34s} {same[0]['bytes']:10,d} {gain:+8.4f} {-lost:+8.4f}  {same[0]['learning_rate']:.1e}")
    return 0
