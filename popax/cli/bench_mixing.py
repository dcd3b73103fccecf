"""`popax bench mixing`: experts mixed for users who have none of their own."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from popax.cli.base import add_base, base_of
from popax.cli.eval import add_data
from popax.cli.gin_door import GinDoor, add_arguments
from popax.cli.main import add_json

NAME = "mixing"
HELP = "Train expert adapters, mix them for held-out users by search and by descent; scores against every expert alone."
EXAMPLE = (
    "popax bench mixing --gin_file configs/runs/expert_mixing.gin --base runs/irc_base/base "
    "--data messages.jsonl.gz --users_with_at_least 100 --json mixing.json"
)
WIRING = "configs/runs/population.gin"


def configure(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    add_base(parser, "a Hugging Face or popax base", serves=False)
    add_data(parser)
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer's path, or byte (default: the base's)")
    parser.add_argument("--users_with_at_least", type=int, default=0, metavar="N", help="only users with N examples")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from popax.adapters.base import AdapterConfig
    from popax.bench.mixing import MixingConfig, bench_mixing, figures_of, verdict
    from popax.bench.report import write_report
    from popax.data.pipeline import PipelineConfig, UserPipeline
    from popax.data.records import Columns
    from popax.data.tokenize import load_tokenizer
    from popax.errors import DataError
    from popax.training.config import TrainConfig
    from popax.training.inputs import check_fits, open_users, select_users

    started, door = time.monotonic(), GinDoor([WIRING, *args.gin_file], args.gin_param)
    config, data, columns = door.build(MixingConfig), door.build(PipelineConfig), door.build(Columns)
    adapter, train = door.build(AdapterConfig), door.build(TrainConfig)
    base, tokenizer = base_of(args), load_tokenizer(args.tokenizer or args.base)
    check_fits(base.model, tokenizer, data.seq_len)
    rows: list[dict] = []

    def report() -> None:
        record = {"mixing": config, "adapter": adapter, "train": train, "data": data, "base": base.digest}
        figures = {**figures_of(rows), "seconds": time.monotonic() - started}
        said = {"verdict": verdict(figures)}
        write_report(args.json, name="bench mixing", config=record | said, figures=figures, rows=rows)

    with tempfile.TemporaryDirectory() as scratch:
        dataset = open_users(args.data, Path(scratch), columns)
        users, wanted = select_users(dataset, at_least=args.users_with_at_least), config.experts + config.users
        if len(users) < wanted:
            asked = f"{config.experts} experts and {config.users} others"
            raise DataError(f"the data has {len(users)} such users, {asked} are asked for")
        pipeline = UserPipeline(dataset, tokenizer, data)
        say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
        try:
            for row in bench_mixing(base, pipeline, users, adapter, config, train, progress=say):
                rows.append(row)
                if args.json:
                    report()  # whole after every user
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{len(rows)} users are in {args.json or 'no report (--json)'}") from None
    figures = figures_of(rows)
    for name, value in figures.items():
        print(f"{name:34s} {value:10.4f}")
    print(verdict(figures))
    return 0
