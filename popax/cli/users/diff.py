"""`popax users diff`: what changed from one revision of a user to another."""

import argparse

from popax.cli.main import add_json
from popax.cli.users.shared import add_catalog, add_user, open_catalog, which, write_json

NAME = "diff"
HELP = "What changed between two revisions of a user: the fields of their manifests, and the weights site by site."
EXAMPLE = "popax users diff runs/irc/catalog ada 1 latest"


def configure(parser: argparse.ArgumentParser) -> None:
    add_catalog(parser)
    add_user(parser)
    parser.add_argument("before", help="a revision: a number, latest, promoted, or a tag")
    parser.add_argument("after", nargs="?", default="latest", help="another one (default: latest)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from popax.store.difference import difference

    found = difference(open_catalog(args), args.user, which(args.before), which(args.after))
    write_json(args, found.to_dict())
    print(f"{found.before.shown} -> {found.after.shown}")
    for name, (old, new) in found.fields.items():
        print(f"  {name}: {old} -> {new}")
    if not found.sites:
        print("  their weight updates do not compare: the revisions are of different cohorts")
    for site in found.sites:
        relative = site.change / site.before if site.before else float("inf")
        print(
            f"  {site.site}: norm {site.before:.4g} -> {site.after:.4g}, changed by {relative:.1%}, "
            f"cosine {site.cosine:.4f}"
        )
    return 0
