"""`popax compose`: one adapter made of several users', by an exact sum or a merge, committed to the catalog."""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from popax.cli.keys import add_sign, add_trust, signer_of, trust_of
from popax.cli.main import add_json
from popax.cli.users.shared import printable, write_json
from popax.errors import ComposeError

if TYPE_CHECKING:
    from popax.store.catalog import Catalog
    from popax.store.compose import Term

NAME = "compose"
HELP = "Combine several users' adapters into one, exactly or by a merge, and commit it as derived from them."
EXAMPLE = "popax compose runs/irc/catalog formal-ada 1.0*ada 0.5*formal-tone@promoted --how cat --rank 16"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("catalog", help="the catalog's directory or URL")
    parser.add_argument("into", help="the user whose next revision the composition is")
    parser.add_argument(
        "terms", nargs="+", metavar="[WEIGHT*]USER[@REVISION]", help="what is combined, a negative weight after --"
    )
    parser.add_argument(
        "--how",
        default="cat",
        choices=("cat", "ties", "dare", "knots", "linear"),
        help="cat (default): the exact weighted sum, of all ranks together; ties, dare, knots: merges on factors; "
        "linear: the weighted sum of states, for methods that are linear in theirs",
    )
    parser.add_argument("--rank", type=int, help="at most this rank, by the best approximation; its error is reported")
    parser.add_argument("--density", type=float, default=0.5, help="the share that stays in ties, dare and knots (0.5)")
    parser.add_argument("--seed", type=int, default=0, help="of dare (0)")
    add_sign(parser)
    add_trust(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # small matrices: an accelerator need not be woken for them
    from popax.store.catalog import Catalog
    from popax.store.compose import compose_revisions

    catalog = Catalog.open(args.catalog, signer=signer_of(args), trusted=trust_of(args))
    terms = terms_of(catalog, args.terms)
    options = {"rank": args.rank, "density": args.density, "seed": args.seed}
    manifest, made = compose_revisions(catalog, terms, args.into, args.how, **options)
    error = max(made.error.values(), default=0.0)
    write_json(args, {"revision": manifest.to_dict(), "error": made.error})
    config = made.cohort.config
    left_out = f", its rank leaves out {error:.2%} of it at the worst site" if error > 1e-6 else ""
    names = ", ".join(printable(term.manifest.shown) for term in terms)
    print(
        f"{printable(manifest.user)}@{manifest.revision}: {config.method} of rank {config.rank} made by {args.how} of "
        f"{names}{left_out}. It is a candidate: popax eval scores it"
    )
    return 0


def terms_of(catalog: "Catalog", texts: Sequence[str]) -> "list[Term]":
    """The revisions and weights that [WEIGHT*]USER[@REVISION] name. Raises ComposeError where one is the base."""
    from popax.serving.names import weighted
    from popax.serving.pool import parse_request
    from popax.store.compose import Term

    asked = [(text, 1.0) if catalog.exists(text) else weighted(text) for text in texts]
    requests = [parse_request(name, catalog) for name, _ in asked]
    users = [(request.user, request.revision) for request in requests if request.user is not None]
    if len(users) < len(requests):
        raise ComposeError("the base is no adapter: a sum of adapters has it already")
    return [Term(manifest, weight) for manifest, (_, weight) in zip(catalog.resolve(users), asked, strict=True)]
