"""`popax migrate`: a population's adapters carried over to a new base."""

import argparse
import math
import tempfile
import time
from pathlib import Path

from popax.cli.eval import add_data
from popax.cli.gin_door import GinDoor, add_arguments
from popax.cli.keys import add_sign, add_trust, signer_of, trust_of
from popax.cli.main import add_json
from popax.cli.users.shared import printable

NAME = "migrate"
HELP = (
    "Carry users' adapters over to a new base: re-applied or distilled, gains measured, committed as derived revisions."
)
EXAMPLE = (
    "popax migrate --gin_file runs/irc/operative.gin --base runs/irc_base/base --to runs/irc_base2/base "
    "--catalog runs/irc/catalog --data runs/irc/data --json migrate.json"
)
# Makes the optimizer, the schedule and early stopping of the distillation reachable by their own keys.
WIRING = "configs/runs/population.gin"


def configure(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    parser.add_argument("--base", required=True, metavar="DIR", help="the base that the adapters were made for")
    parser.add_argument("--to", required=True, metavar="DIR", help="the base that they are carried over to")
    parser.add_argument(
        "--catalog", required=True, metavar="DIR", help="the users' adapters, and where the new ones go"
    )
    add_data(parser)
    parser.add_argument("--user", action="append", metavar="ID", help="only this user (repeatable)")
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer's path, or byte (default: the old base's)")
    parser.add_argument(
        "--distill_steps",
        type=int,
        default=0,
        metavar="N",
        help="then train each to say what the old base said of the user's text, N steps of TrainConfig (default 0)",
    )
    add_sign(parser)
    add_trust(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from popax.bench.report import write_report
    from popax.data.pipeline import PipelineConfig, UserPipeline
    from popax.data.records import Columns
    from popax.data.tokenize import load_tokenizer
    from popax.evaluation.columns import EvalConfig
    from popax.modeling.base import load_base
    from popax.store.catalog import Catalog
    from popax.training.config import TrainConfig
    from popax.training.console import step_bar
    from popax.training.inputs import check_fits, open_users
    from popax.training.migrate import Migrated, migrate

    started, door = time.monotonic(), GinDoor([WIRING, *args.gin_file], args.gin_param)
    data, config, columns = door.build(PipelineConfig), door.build(EvalConfig), door.build(Columns)
    distillation = None
    if args.distill_steps:
        distillation = door.build(TrainConfig, steps=args.distill_steps)
    old, new, tokenizer = load_base(args.base), load_base(args.to), load_tokenizer(args.tokenizer or args.base)
    for base in (old, new):
        check_fits(base.model, tokenizer, data.seq_len)
    catalog = Catalog.open(args.catalog, signer=signer_of(args), trusted=trust_of(args))
    done: list[Migrated] = []
    with tempfile.TemporaryDirectory() as scratch, step_bar("migrate", unit="user") as tell:
        dataset = open_users(args.data, Path(scratch), columns)
        known = set(dataset.users())
        users = args.user or [record.user for record in catalog.list() if record.user in known]
        try:
            pipeline = UserPipeline(dataset, tokenizer, data)
            for group in migrate(old, new, pipeline, catalog, users, config, distillation=distillation):
                done += group
                tell(len(done), len(users))
        except KeyboardInterrupt:
            saved = f"{len(done)} users are committed in {args.catalog}; the same command goes on with the others"
            raise KeyboardInterrupt(saved) from None
    for one in done:
        print(
            f"{printable(one.user)}@{one.source} -> @{one.revision} ({one.how}): gain {one.gain_before:.4f} -> "
            f"{one.gain_after:.4f} bits per byte"
        )
    scored = [one for one in done if not math.isnan(one.gain_before)]
    names = ("gain_before", "gain_reapplied", "gain_after")
    means = [sum(getattr(one, name) for one in scored) / max(len(scored), 1) for name in names]
    print(
        f"{len(done)} users migrated, {len(users) - len(done)} were there already; mean gain {means[0]:.4f} -> "
        f"{means[2]:.4f} (re-applied {means[1]:.4f}). The new revisions are candidates: score them with popax eval "
        f"--base {args.to} --promote"
    )
    if args.json:
        figures = {
            "users": len(done),
            "mean_gain_before": means[0],
            "mean_gain_reapplied": means[1],
            "mean_gain_after": means[2],
            "gain_kept": means[2] / means[0] if means[0] else float("nan"),
            "seconds": time.monotonic() - started,
        }
        record = {"data": data, "evaluation": config, "from": old.digest, "to": new.digest}
        record["distillation"] = distillation
        rows = [one._asdict() for one in done]
        write_report(args.json, name="migrate", config=record, figures=figures, rows=rows)
    return 0
