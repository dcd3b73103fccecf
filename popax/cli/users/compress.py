"""`popax users compress`: cold users' rows in fewer bits."""

import argparse
import math

from popax.cli.keys import add_sign, add_trust
from popax.cli.main import add_json
from popax.cli.users.shared import add_catalog, add_filters, counting, filters_of, open_catalog, printable, write_json

NAME = "compress"
HELP = "Commit users' latest revisions again in fewer bytes, where that changes them little enough; say what it cost."
EXAMPLE = (
    "popax users compress runs/irc/catalog --until 2026-01-01 --form int8 --max_error 0.01\n"
    "  popax users compress runs/irc/catalog --form basis-int8 --rank 16 --clusters 4 --max_error 0.3"
)
FORMS = ("int8", "int4", "basis", "basis-int8", "basis-int4")


def configure(parser: argparse.ArgumentParser) -> None:
    add_catalog(parser)
    add_filters(parser)
    parser.add_argument(
        "--form",
        choices=FORMS,
        default="int8",
        help="integers of so many bits, or coefficients in a basis that a cluster shares, or both (default int8)",
    )
    parser.add_argument(
        "--max_error",
        type=float,
        default=0.01,
        metavar="E",
        help="relative error that is accepted: of the numbers or, in a basis, of the weight update (default 0.01)",
    )
    parser.add_argument("--rank", type=int, default=16, metavar="S", help="of each basis (default 16)")
    parser.add_argument("--clusters", type=int, default=1, metavar="K", help="bases, of a cluster each (default 1)")
    parser.add_argument(
        "--fit_users", type=int, default=256, metavar="N", help="users that bases are fitted on (default 256)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the fit (default 0)")
    add_sign(parser)
    add_trust(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from popax.errors import CatalogError
    from popax.store.compress import Shared, compress
    from popax.store.filters import UserFilter

    if not 0 <= args.max_error < math.inf:
        raise CatalogError(f"--max_error {args.max_error}: a number, not negative")
    for name in ("rank", "clusters", "fit_users"):
        if getattr(args, name) < 1:
            raise CatalogError(f"--{name} {getattr(args, name)}: at least 1")
    catalog = open_catalog(args, write=True)
    users = [record.user for record, _ in catalog.users(UserFilter(**filters_of(args)))]
    shared = Shared(rank=args.rank, clusters=args.clusters, fit_users=args.fit_users, seed=args.seed)
    told = counting("users looked at")
    found = compress(catalog, users, form=args.form, max_error=args.max_error, shared=shared, progress=told)
    write_json(args, [one._asdict() for one in found])
    smaller = [one for one in found if one.revision is not None]
    for one in found:
        if one.revision is None and one.error is not None:
            print(f"{printable(one.user)}@{one.source} is left as it is: error {one.error:.4f} > {args.max_error:g}")
    before, after = (sum(getattr(one, name) for one in smaller) for name in ("bytes_before", "bytes_after"))
    worst = max((one.error or 0.0 for one in smaller), default=0.0)
    print(
        f"{len(smaller):,} of {len(found):,} users compressed: {before:,} bytes of rows to {after:,}, relative error "
        f"at most {worst:.4f}. They are candidates, derived from what they replace, which stays until it is pruned."
    )
    return 0
