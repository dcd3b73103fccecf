"""`popax users list`: who is in a catalog."""

import argparse
import itertools
import json

from popax.atomic import write_text
from popax.cli.main import add_json
from popax.cli.users.shared import add_catalog, add_filters, filters_of, open_catalog, user_line

NAME = "list"
HELP = "The users of a catalog, sorted by id: all, or those that the filters leave."
EXAMPLE = "popax users list runs/irc/catalog --prefix a --status candidate --json users.json"


def configure(parser: argparse.ArgumentParser) -> None:
    add_catalog(parser)
    add_filters(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many (whichever are met first)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from popax.store.filters import UserFilter

    found = open_catalog(args).users(UserFilter(**filters_of(args)))
    # As text: a million users' records would not be small.
    lines = sorted(
        (record.user, user_line(record), json.dumps(record.to_dict()) if args.json else "")
        for record, _ in itertools.islice(found, args.limit)
    )
    if args.json:
        write_text(args.json, "[\n" + ",\n".join(text for _, _, text in lines) + "\n]\n")
    for _, line, _ in lines:
        print(line)
    return 0
