"""`popax users stat`: what a catalog holds, counted."""

import argparse

from popax.cli.main import add_json
from popax.cli.users.shared import add_catalog, counting, open_catalog, table, write_json

NAME = "stat"
HELP = "How many users, revisions and promotions a catalog holds, cohort by cohort, and its bytes on disk."
EXAMPLE = "popax users stat runs/irc/catalog --json stat.json"


def configure(parser: argparse.ArgumentParser) -> None:
    add_catalog(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from popax.store.statistics import statistics

    found = statistics(open_catalog(args), counting("users read"))
    write_json(args, found.to_dict())
    counts = [(name, f"{getattr(found, name):,}") for name in ("users", "revisions", "promoted", "tags")]
    size = "not counted at a URL" if found.file_bytes is None else f"{found.file_bytes:,}"
    table([*counts, ("bytes on disk", size)])
    for one in found.cohorts:
        print(
            f"cohort {one.cohort}: {one.users:,} users, {one.method} rank {one.rank}, {one.row_bytes:,} bytes a row, "
            f"base {one.base_digest[:12]}"
        )
    return 0
