"""`popax users gc`: the bytes of what was deleted, replaced or abandoned, taken out of the files."""

import argparse
import sys

from popax.cli.main import add_json
from popax.cli.users.shared import add_catalog, open_catalog, table, write_json

NAME = "gc"
HELP = "Give back the bytes of what was deleted, replaced or abandoned. Readers and writers may go on."
EXAMPLE = "popax users gc runs/irc/catalog --json gc.json"


def configure(parser: argparse.ArgumentParser) -> None:
    add_catalog(parser)
    parser.add_argument(
        "--grace",
        type=float,
        metavar="SECONDS",
        help="what looks abandoned (rows that a run has staged; at a URL, files too) is noted now and removed by a gc "
        "this much later (default 3600; 0: nobody is staging or, at a URL, writing: remove it now)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from popax.store.gc import GRACE_S

    grace_s = GRACE_S if args.grace is None else args.grace
    found = open_catalog(args, write=True).gc(
        grace_s=grace_s, say=lambda line: print(line, file=sys.stderr, flush=True)
    )
    write_json(args, found.to_dict())
    table([(name.replace("_", " "), f"{value:,}") for name, value in found.to_dict().items()])
    return 0
