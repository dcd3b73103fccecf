"""`popax users rollback`: serving follows an earlier promoted revision again."""

import argparse

from popax.cli.main import add_json
from popax.cli.users.shared import (
    add_catalog,
    add_revision,
    add_user,
    open_catalog,
    user_line,
    which,
    write_json,
)

NAME = "rollback"
HELP = "Make serving follow the revision that was promoted before, or an earlier promoted one. Moves one pointer."
EXAMPLE = "popax users rollback runs/irc/catalog ada"


def configure(parser: argparse.ArgumentParser) -> None:
    add_catalog(parser)
    add_user(parser)
    add_revision(parser, "the one promoted before")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    record = open_catalog(args, write=True).rollback(args.user, which(args.revision))
    write_json(args, record.to_dict())
    print(user_line(record))
    return 0
