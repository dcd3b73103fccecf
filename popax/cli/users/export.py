"""`popax users export`: manifests as Parquet."""

import argparse

from popax.cli.users.shared import add_catalog, add_filters, counting, filters_of, open_catalog

NAME = "export"
HELP = "Write the manifests as one Parquet file, a row a revision."
EXAMPLE = "popax users export runs/irc/catalog revisions.parquet --latest"


def configure(parser: argparse.ArgumentParser) -> None:
    add_catalog(parser)
    parser.add_argument("output", help="the file to write")
    parser.add_argument("--latest", action="store_true", help="only each user's latest revision")
    add_filters(parser)


def run(args: argparse.Namespace) -> int:
    from popax.store.export import export_parquet
    from popax.store.filters import UserFilter

    where = UserFilter(**filters_of(args))
    count = export_parquet(
        open_catalog(args), args.output, where=where, latest_only=args.latest, progress=counting("revisions written")
    )
    print(f"{count:,} revisions in {args.output}")
    return 0
