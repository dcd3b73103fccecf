"""`popax users`: who is in a catalog, and what revisions a user has."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from popax.cli.main import add_json, write_output

NAME = "users"
HELP = "List a catalog's users, or one user's revisions."
EXAMPLE = "popax users runs/irc/catalog --prefix a\n  popax users runs/irc/catalog ada --json history.json"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("catalog", help="the catalog's directory or URL")
    parser.add_argument("user", nargs="?", help="show this user's revisions, oldest first")
    parser.add_argument("--prefix", default="", help="only users whose id starts with this")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from popax.store.catalog import Catalog

    catalog = Catalog.open(args.catalog, read_only=True)
    if args.user is not None:
        records = [manifest.to_dict() for manifest in catalog.history(args.user)]
        lines = _history_lines(records)
    else:
        records = [record.to_dict() for record in catalog.list(args.prefix)]
        lines = _user_lines(records)
    if args.json:
        write_output(args.json, json.dumps(records, indent=2) + "\n")
    for line in lines:
        print(line)
    return 0


def _user_lines(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for record in records:
        promoted = f", promoted @{record['promoted']}" if record.get("promoted") else ""
        yield f"{_printable(record['user'])}@{record['latest']}{promoted}"


def _history_lines(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for record in records:
        config = record["config"]
        parent = f" after @{record['parent']}" if record["parent"] else ""
        metrics = "".join(f" {name}={_short(value)}" for name, value in sorted(record["metrics"].items()))
        yield (
            f"{_printable(record['user'])}@{record['revision']}{parent}  {record['created']}  {config['method']} "
            f"rank {config['rank']}  base {record['base_digest'][:12]}  digest {record['digest'][:12]}{metrics}"
        )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _printable(user: str) -> str:
    # An id may hold anything, a terminal's control sequences included.
    return user if user.isprintable() else ascii(user)
