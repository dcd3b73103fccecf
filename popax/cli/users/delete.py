"""`popax users delete`: a user removed, and what else holds something of them."""

import argparse

from popax.cli.main import add_json
from popax.cli.users.shared import add_catalog, fitted_line, open_catalog, printable, write_json
from popax.errors import CatalogError

NAME = "delete"
HELP = "Remove users with all their revisions, and list the revisions of others that were derived from them."
EXAMPLE = "popax users delete runs/irc/catalog ada --yes"


def configure(parser: argparse.ArgumentParser) -> None:
    add_catalog(parser)
    parser.add_argument("user", nargs="+", help="the users' ids")
    parser.add_argument("--yes", action="store_true", help="they are removed for good: say that you mean it")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if not args.yes:
        raise CatalogError(f"{len(args.user)} users would be removed for good; repeat with --yes")
    catalog = open_catalog(args, write=True)
    done = []
    for user in args.user:
        deletion = catalog.delete(user)
        named = {name: [one._asdict() for one in getattr(deletion, name)] for name in ("tainted", "bases")}
        done.append({**deletion._asdict(), **named})
        print(f"{printable(user)}: {deletion.revisions} revisions removed")
        for one in deletion.tainted:
            print(f"  {printable(one.user)}@{one.revision} was derived from {printable(one.parent)}@{one.of}")
        for basis in deletion.bases:
            print(fitted_line(basis))
    write_json(args, done)
    print("unreachable now; `popax users gc` takes the bytes out of the files")
    return 0
