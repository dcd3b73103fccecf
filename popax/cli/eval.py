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
from popax.cli.keys import add_trust, trust_of
from popax.cli.main import add_json
from popax.cli.users.shared import printable, which

if TYPE_CHECKING:
    from popax.evaluation.columns import UserScores
    from popax.evaluation.promotion import Outcome

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
    parser.add_argument(
        "--record", action="store_true", help="score each user's revision for the gate, and keep the scores beside it"
    )
    parser.add_argument("--promote", action="store_true", help="as --record, then promote those that pass GateConfig")
    parser.add_argument(
        "--retention", nargs="+", metavar="PATH", help="text that the base knew: what an adapter loses on it is scored"
    )
    parser.add_argument("--retention_rows", type=int, default=64, metavar="N", help="rows of that text (default 64)")
    parser.add_argument("--revision", metavar="WHICH", help="to score: latest (default), promoted, a number, or a tag")
    add_trust(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from popax.data.pipeline import PipelineConfig, UserPipeline
    from popax.data.records import Columns
    from popax.data.tokenize import load_tokenizer
    from popax.evaluation.columns import EvalConfig
    from popax.evaluation.gate import GateConfig
    from popax.store.catalog import Catalog
    from popax.training.inputs import check_fits, open_users
    from popax.training.scoring import record_scores
    from popax.training.session import score

    started, door = time.monotonic(), open_door(args)
    data, config, columns = door.build(PipelineConfig), door.build(EvalConfig), door.build(Columns)
    base, tokenizer = base_of(args), load_tokenizer(args.tokenizer or args.base)
    check_fits(base.model, tokenizer, data.seq_len)
    recording = args.record or args.promote
    catalog = Catalog.open(args.catalog, read_only=not recording, trusted=trust_of(args))
    everyone = Catalog.open(args.shared, read_only=True) if args.shared else None
    with tempfile.TemporaryDirectory() as scratch:  # where raw sources are built; a dataset stays where it is
        dataset = open_users(args.data, Path(scratch), columns)
        known = set(dataset.users())
        users = args.user or [record.user for record in catalog.list() if record.user in known]
        pipeline = UserPipeline(dataset, tokenizer, data)
        if recording:
            retention = retention_text(args, pipeline, columns, Path(scratch), config)
            gate = door.build(GateConfig) if args.promote else None
            requests = [(user, which(args.revision)) for user in users]
            outcomes = record_scores(base, pipeline, catalog, requests, config, retention=retention, gate=gate)
            finish_recording(args, {"data": data, "evaluation": config, "gate": gate}, outcomes, started)
            return 0
        scores = score(base, pipeline, catalog, users, config, everyone)
    finish(args, "eval", {"data": data, "evaluation": config, "base": base.digest}, {}, scores, started)
    return 0


def retention_text(args: argparse.Namespace, users: Any, columns: Any, scratch: Path, config: Any) -> Any:
    """What --retention names, cut as the users' text is; None without it."""
    from popax.data.pipeline import UserPipeline
    from popax.evaluation.revisions import OneText
    from popax.training.inputs import open_users

    if not args.retention:
        return None
    dataset = open_users(args.retention, scratch / "retention", columns)
    pipeline = UserPipeline(dataset, users.tokenizer, users.config)
    return OneText.of(pipeline, list(dataset.users()), config, args.retention_rows)


def finish_recording(
    args: argparse.Namespace, config: Mapping[str, Any], outcomes: "Sequence[Outcome]", started: float
) -> None:
    """A line for each revision, and the report that --json asks for."""
    from popax.bench.report import write_report

    rows = []
    for manifest, scores, verdict in outcomes:
        name = f"{printable(manifest.user)}@{manifest.revision}"
        reasons = "; ".join(verdict.reasons)
        print(f"{name}: {'promoted' if verdict.passed else f'candidate ({reasons})' if args.promote else 'scored'}")
        kept = scores and {
            **{key: getattr(scores, key) for key in ("own", "base", "gain", "retention_loss", "norm", "target_bytes")}
        }
        rows.append({"user": manifest.user, "revision": manifest.revision, **(kept or {}), **verdict.to_dict()})
    figures = {
        "scored": len(rows),
        "promoted": sum(row["passed"] for row in rows) if args.promote else 0,
        "seconds": time.monotonic() - started,
    }
    if args.json:
        write_report(args.json, name="eval", config=config, figures=figures, rows=rows)


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
