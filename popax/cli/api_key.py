"""`popax api-key`: an API key for `popax serve --keys`."""

import argparse
import sys

NAME = "api-key"
HELP = "Make an API key for one tenant's users (or an admin's for all) and add its digest to a key file."
EXAMPLE = "popax api-key keys.json --tenant acme"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "keys", metavar="FILE", help="the key file; made where there is none, readable by its owner only"
    )
    parser.add_argument(
        "--tenant", default="", metavar="NAME", help="whose users it may name: NAME/user is asked as user"
    )
    parser.add_argument(
        "--admin", action="store_true", help="may promote, roll back, pin; without --tenant: everybody's"
    )


def run(args: argparse.Namespace) -> int:
    from popax.serving.http.keys import new_key

    key = new_key(args.keys, args.tenant, admin=args.admin)
    print(key)
    print(f"its digest is in {args.keys}; the key itself is kept nowhere, and shown this once", file=sys.stderr)
    return 0
