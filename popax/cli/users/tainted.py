"""`popax users tainted`: what was derived from a user's revisions."""

import argparse

from popax.cli.main import add_json
from popax.cli.users.shared import add_catalog, add_user, fitted_line, open_catalog, printable, write_json

NAME = "tainted"
HELP = "What holds something of a user's, deleted or not: revisions derived from theirs, bases fitted on them."
EXAMPLE = "popax users tainted runs/irc/catalog ada"


def configure(parser: argparse.ArgumentParser) -> None:
    add_catalog(parser)
    add_user(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    catalog = open_catalog(args)
    found, bases = catalog.tainted(args.user), catalog.bases.fitted_on(args.user)
    write_json(args, {"derived": [one._asdict() for one in found], "bases": [one._asdict() for one in bases]})
    for one in found:
        print(f"{printable(one.user)}@{one.revision} was derived from {printable(one.parent)}@{one.of}")
    for basis in bases:
        print(fitted_line(basis))
    return 0
