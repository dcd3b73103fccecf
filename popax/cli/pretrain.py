"""`popax pretrain`: a base from users' text."""

import argparse
import math
import sys
import time
from pathlib import Path

from popax.cli.eval import add_data
from popax.cli.gin_door import add_arguments, open_door
from popax.cli.main import add_json

NAME = "pretrain"
HELP = "Train a small base, with its tokenizer, on users' text; Ctrl-C checkpoints, the same command continues."
EXAMPLE = (
    "popax pretrain --gin_file configs/runs/irc_ubuntu_base.gin --data messages.jsonl.gz --users_below 100 "
    "--tokenizer bpe:2048 --out runs/irc_base"
)


def configure(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    add_data(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="the run's directory; the base is DIR/base")
    parser.add_argument(
        "--tokenizer", default="byte", metavar="WHICH", help="byte (default), bpe:SIZE trained on the text, or a path"
    )
    parser.add_argument("--users_below", type=int, metavar="N", help="only users with fewer than N examples")
    parser.add_argument("--users_with_at_least", type=int, default=0, metavar="N", help="only users with N or more")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from popax.bench.report import write_report
    from popax.data.pipeline import PipelineConfig
    from popax.data.records import Columns
    from popax.errors import Preempted
    from popax.modeling.config import ModelConfig
    from popax.training.base_run import pretrain_base
    from popax.training.console import watch_pretraining
    from popax.training.inputs import open_users, select_users
    from popax.training.interrupt import StopOnSignal
    from popax.training.pretrain import PretrainConfig

    started, out = time.monotonic(), Path(args.out)
    door = open_door(args)
    model, config, data = door.build(ModelConfig), door.build(PretrainConfig), door.build(PipelineConfig)
    dataset = open_users(args.data, out / "data", door.build(Columns), progress=sys.stderr.isatty())
    users = select_users(dataset, at_least=args.users_with_at_least, below=args.users_below)
    with (
        StopOnSignal() as stop,
        watch_pretraining(out, config, save_config=lambda: door.save(out), stop_requested=stop) as hooks,
    ):
        report = pretrain_base(
            dataset, users, model, data, config, tokenizer=args.tokenizer, directory=out, hooks=hooks
        )
    if report.base is None:
        saved = f"step {report.steps} of {config.steps} is checkpointed in {out}; the same command continues from there"
        raise Preempted(saved) if stop.preempted else KeyboardInterrupt(saved)
    if args.json:
        figures = {
            "steps": report.steps,
            "num_params": report.num_params,
            "users": report.users,
            "held_out_bits_per_byte": report.held_out,
            "seconds": time.monotonic() - started,
        }
        write_report(
            args.json,
            name="pretrain",
            config={"model": model, "pretrain": config, "data": data, "tokenizer": args.tokenizer},
            figures=figures,
        )
    held_out = "nothing held out" if math.isnan(report.held_out) else f"{report.held_out:.3f} bits per byte held out"
    print(
        f"{report.base}: {report.num_params:,} parameters, {report.steps} steps on {report.users} users' text, "
        f"{held_out}"
    )
    return 0
