"""`popax users tag`: names for revisions."""

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

NAME = "tag"
HELP = "Give one of a user's revisions a name, move a name, or take it away."
EXAMPLE = "popax users tag runs/irc/catalog ada before-summer --revision 3"


def configure(parser: argparse.ArgumentParser) -> None:
    add_catalog(parser)
    add_user(parser)
    parser.add_argument("name", help="letters, digits, '_', '.' and '-'")
    add_revision(parser, "latest")
    parser.add_argument("--remove", action="store_true", help="take the name away")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    catalog = open_catalog(args, write=True)
    if args.remove:
        record = catalog.untag(args.user, args.name)
    else:
        record = catalog.tag(args.user, args.name, which(args.revision))
    write_json(args, record.to_dict())
    print(user_line(record))
    return 0
