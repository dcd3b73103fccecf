"""`popax users verify`: every revision read and checked."""

import argparse
import time

from popax.cli.keys import add_trust
from popax.cli.main import add_json
from popax.cli.users.shared import add_catalog, counting, open_catalog, printable, table, write_json

NAME = "verify"
HELP = "Read every revision and check it: seals, pointers, digests, rows. Exit code 1 where something is wrong."
EXAMPLE = "popax users verify runs/irc/catalog --json audit.json"
EXIT_PROBLEMS = 1


def configure(parser: argparse.ArgumentParser) -> None:
    add_catalog(parser)
    parser.add_argument("user", nargs="*", help="only these users (default: all, and what no user's record leads to)")
    add_trust(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    audit = open_catalog(args).verify(args.user or None, progress=counting("users read"))
    seconds = time.monotonic() - started
    write_json(args, {**audit.to_dict(), "seconds": seconds})
    table(
        [
            ("users", f"{audit.users:,}"),
            ("revisions", f"{audit.revisions:,}"),
            ("rows", f"{audit.rows:,} ({audit.row_bytes:,} bytes)"),
            ("optimizer states", f"{audit.optimizer_states:,}"),
            ("orphans", f"{audit.orphan_rows:,} rows, {audit.orphan_records:,} records"),
            ("problems", f"{audit.problem_count:,}"),
            ("seconds", f"{seconds:.1f}"),
        ]
    )
    for problem in audit.problems:
        at = f"@{problem.revision}" if problem.revision is not None else ""
        print(f"  {printable(problem.user)}{at}: {problem.what}")
    return 0 if audit.clean else EXIT_PROBLEMS
