"""`popax users prune`: a user's old revisions removed."""

import argparse

from popax.cli.main import add_json
from popax.cli.users.shared import add_catalog, add_user, open_catalog, printable, write_json

NAME = "prune"
HELP = "Remove a user's revisions below a number; the latest, the promoted and the tagged ones cannot be."
EXAMPLE = "popax users prune runs/irc/catalog ada --before 5"


def configure(parser: argparse.ArgumentParser) -> None:
    add_catalog(parser)
    add_user(parser)
    parser.add_argument("--before", type=int, required=True, metavar="N", help="remove the revisions below this one")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    gone = open_catalog(args, write=True).prune(args.user, before=args.before)
    write_json(args, {"user": args.user, "revisions": gone})
    print(f"{printable(args.user)}: {len(gone)} revisions removed; `popax users gc` takes the bytes out of the files")
    return 0
