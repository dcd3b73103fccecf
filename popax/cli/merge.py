"""`popax merge`: an adapter written into a copy of its base's weights, for what knows no adapters."""

import argparse
import os

from popax.cli.compose import terms_of
from popax.cli.keys import add_trust, trust_of
from popax.cli.main import add_json
from popax.cli.users.shared import printable, write_json

NAME = "merge"
HELP = "Write a base whose weights hold a user's adapter, or an exact weighted sum of several users'."
EXAMPLE = "popax merge runs/irc/catalog ada@promoted --base runs/irc_base/base --out runs/ada_base"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("catalog", help="the catalog's directory or URL")
    parser.add_argument("terms", nargs="+", metavar="[WEIGHT*]USER[@REVISION]", help="what is merged into the weights")
    parser.add_argument("--base", required=True, metavar="DIR", help="the base that the adapters were made for")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the new base goes; must not exist")
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer's path, or byte (default: the base's)")
    add_trust(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # one product a site: an accelerator need not be woken for them
    from popax.data.tokenize import load_tokenizer
    from popax.modeling.base import load_base, save_base
    from popax.store.catalog import Catalog
    from popax.store.merge import merged_base

    catalog = Catalog.open(args.catalog, trusted=trust_of(args))
    terms, tokenizer = terms_of(catalog, args.terms), load_tokenizer(args.tokenizer or args.base)
    base = merged_base(catalog, load_base(args.base), terms)
    save_base(args.out, base)
    tokenizer.save(args.out)
    names = [term.manifest.shown for term in terms]
    write_json(args, {"base": args.out, "digest": base.digest, "of": names})
    print(
        f"{args.out}: the base {base.digest} with {', '.join(map(printable, names))} in its weights. No deletion "
        "reaches it: it is to be deleted with them"
    )
    return 0
