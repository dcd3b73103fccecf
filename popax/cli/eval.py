"""`popax eval`: held-out bits per byte of the base, a shared adapter, each user's own and another user's."""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from popax.cli.base import add_base, base_of
from popax.cli.gin_door import add_arguments, open_door
from popax.cli.main import add_json

if TYPE_CHECKING:
    from popax.evaluation.columns import UserScores

NAME = "eval"
HELP = "Score a catalog's users on held-out text: base, shared, own and another user's adapter, in bits per byte."
EXAMPLE = (
    "popax eval --gin_file runs/irc/operative.gin --base runs/irc_base/base --catalog runs/irc/catalog "
    "--shared runs/irc/shared --data runs/irc/data --json eval.json"
)


def add_data(parser: argparse.ArgumentParser) -> None:
    """--data, as every command that reads users' text takes it."""
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="PATH",
        help="JSONL, gzipped JSONL, Parquet or CSV files, directories, globs; or one dataset that popax built",
    )


def configure(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    add_base(parser, "the base that the adapters were made for")
    parser.add_argument("--catalog", required=True, metavar="DIR", help="the users' adapters")
    add_data(parser)
    parser.add_argument("--shared", metavar="DIR", help="the catalog of the shared adapter (a run's `shared`)")
    parser.add_argument("--user", action="append", metavar="ID", help="only this user (repeatable, two or more)")
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer's path, or byte (default: the base's)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from popax.data.pipeline import PipelineConfig, UserPipeline
    from popax.data.records import Columns
    from popax.data.tokenize import load_tokenizer
    from popax.evaluation.columns import EvalConfig
    from popax.store.catalog import Catalog
    from popax.training.inputs import check_fits, open_users
    from popax.training.session import score

    started, door = time.monotonic(), open_door(args)
    data, config, columns = door.build(PipelineConfig), door.build(EvalConfig), door.build(Columns)
    base, tokenizer = base_of(args), load_tokenizer(args.tokenizer or args.base)
    check_fits(base.model, tokenizer, data.seq_len)
    catalog = Catalog.open(args.catalog, read_only=True)
    everyone = Catalog.open(args.shared, read_only=True) if args.shared else None
    with tempfile.TemporaryDirectory() as scratch:  # where raw sources are built; a dataset stays where it is
        dataset = open_users(args.data, Path(scratch), columns)
        known = set(dataset.users())
        users = args.user or [record.user for record in catalog.list() if record.user in known]
        scores = score(base, UserPipeline(dataset, tokenizer, data), catalog, users, config, everyone)
    finish(args, "eval", {"data": data, "evaluation": config, "base": base.digest}, {}, scores, started)
    return 0


def finish(
    args: argparse.Namespace,
    name: str,
    config: Mapping[str, Any],
    counts: Mapping[str, Any],
    scores: "Sequence[UserScores]",
    started: float,
) -> None:
    """Print the table, if there is one, and write the report that --json asks for."""
    from popax.bench.report import write_report
    from popax.evaluation.catalog import table_lines
    from popax.evaluation.columns import figures

    gains = figures(scores) if scores else {}
    if scores:
        print("\n".join(table_lines(scores, gains)))
    if args.json:
        write_report(
            args.json,
            name=name,
            config=config,
            figures={**counts, **gains, "seconds": time.monotonic() - started},
            rows=[dataclasses.asdict(row) for row in scores],
        )
