"""`popax users history`: one user's revisions, oldest first."""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from popax.cli.main import add_json
from popax.cli.users.shared import add_catalog, add_user, metrics_text, open_catalog, printable, write_json

NAME = "history"
HELP = "One user's revisions, oldest first."
EXAMPLE = "popax users history runs/irc/catalog ada --json history.json"


def configure(parser: argparse.ArgumentParser) -> None:
    add_catalog(parser)
    add_user(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    catalog = open_catalog(args)
    manifests = [manifest.to_dict() for manifest in catalog.history(args.user)]
    [record] = catalog.records([args.user])
    write_json(args, manifests)
    for line in _lines(manifests, record.promoted if record else None):
        print(line)
    return 0


def _lines(manifests: list[dict[str, Any]], promoted: int | None) -> Iterator[str]:
    for one in manifests:
        config = one["config"]
        parent = f" after @{one['parent']}" if one["parent"] else ""
        status = " promoted" if one["revision"] == promoted else ""
        yield (
            f"{printable(one['user'])}@{one['revision']}{parent}{status}  {one['created']}  {config['method']} "
            f"rank {config['rank']}  base {one['base_digest'][:12]}  digest {one['digest'][:12]}{_origin(one)}"
            f"{metrics_text(one['metrics'])}"
        )


def _origin(manifest: Mapping[str, Any]) -> str:
    parents = ", ".join(f"{printable(user)}@{at}" for user, at, _ in manifest["derived_from"])
    return f"  derived from {parents}" if parents else ""
