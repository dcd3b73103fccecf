"""`popax bench nightly`: the training command night after night."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from popax.cli.gin_door import add_arguments, open_door
from popax.cli.main import add_json

NAME = "nightly"
HELP = "Run popax train night after night: who is trained, a chain against once, many users of whom few have news."
EXAMPLE = (
    "popax bench nightly --json nightly.json\n"
    "  popax bench nightly --only nights --data messages.jsonl.gz --users_with_at_least 50"
)
PARTS = ("nights", "scale")


def configure(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="users' text with times, for the nights (default: Python's standard library, a package a user)",
    )
    parser.add_argument("--users_with_at_least", type=int, default=20, metavar="N", help="only users with N texts (20)")
    parser.add_argument("--only", choices=PARTS, help="one part (default: both)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from popax.bench.nightly.config import NightlyConfig
    from popax.bench.nightly.nights import bench_nights
    from popax.bench.nightly.scale import bench_scale
    from popax.bench.report import write_report

    config = open_door(args).build(NightlyConfig)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    figures: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        if args.only != "scale":
            place = Path(scratch) / "nights"
            place.mkdir()
            figures, rows = bench_nights(_messages(args), config, place, say)
        if args.only != "nights":
            place = Path(scratch) / "scale"
            place.mkdir()
            figures |= bench_scale(config, place, say)
    for name, value in figures.items():
        print(f"{name:28s} {value:.4g}" if isinstance(value, float) else f"{name:28s} {value}")
    if args.json:
        source = "the standard library" if not args.data else [Path(path).name for path in args.data]
        record = {"bench": config, "data": source, "users_with_at_least": args.users_with_at_least}
        write_report(args.json, name="bench nightly", config=record, figures=figures, rows=rows)
    return 0


def _messages(args: argparse.Namespace) -> dict[str, list[tuple[float, str]]]:
    from popax.data.records import read_examples
    from popax.data.stdlib import standard_library

    found: dict[str, list[tuple[float, str]]] = {}
    if args.data:
        for example in read_examples(args.data):
            if example.text:
                found.setdefault(example.user, []).append((example.time or 0, example.text))
    else:
        # In time each package writes at a pace of its own: a document every so many moments.
        for name, documents in standard_library().items():
            found[name] = [((at + 1) / len(documents), text) for at, (_, text) in enumerate(documents)]
    return {user: sorted(own) for user, own in found.items() if len(own) >= args.users_with_at_least}
