"""`popax users tainted`: what was derived from a user's revisions."""

import argparse

from popax.cli.main import add_json
from popax.cli.users.shared import add_catalog, add_user, open_catalog, printable, write_json

NAME = "tainted"
HELP = "The revisions of others that were merged, composed, distilled or migrated from a user's, deleted or not."
EXAMPLE = "popax users tainted runs/irc/catalog ada"


def configure(parser: argparse.ArgumentParser) -> None:
    add_catalog(parser)
    add_user(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    found = open_catalog(args).tainted(args.user)
    write_json(args, [one._asdict() for one in found])
    for one in found:
        print(f"{printable(one.user)}@{one.revision} was derived from {printable(one.parent)}@{one.of}")
    return 0
