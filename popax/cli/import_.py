"""`popax import`: a PEFT directory becomes a user's next revision."""

import argparse
import json
import os

from popax.atomic import write_text
from popax.cli.keys import add_sign, signer_of
from popax.cli.main import add_json

NAME = "import"
HELP = "Commit a Hugging Face PEFT directory to a catalog, as the user's next revision."
EXAMPLE = "popax import runs/irc/catalog ada ada-peft --base models/llama"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("catalog", help="the catalog's directory or URL; made where there is none")
    parser.add_argument("user", help="the user's id")
    parser.add_argument("directory", help="the PEFT directory to read")
    parser.add_argument("--base", required=True, metavar="PATH", help="the base that the adapter was made for")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="stored as (default: the file's)")
    add_sign(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from popax.adapters.cohort import Cohort
    from popax.adapters.peft import directory_digests, load_peft
    from popax.modeling.base import open_base
    from popax.store.catalog import Catalog
    from popax.store.layout import RowLayout

    # The base gives the sites, and the digest that the revision is bound to.
    base = open_base(args.base)
    config, adapter = load_peft(
        args.directory,
        base.model.sites(),
        dtype=args.dtype,
        base_weight=base.site_weight,
        base_bias=base.site_bias,
    )
    cohort = Cohort.of(config, base.model.sites())
    catalog = Catalog.open(args.catalog, create=True, signer=signer_of(args))
    stored = catalog.cohort(config, cohort.specs, base.digest, RowLayout.of(adapter))
    source = {"directory": os.path.basename(os.path.abspath(args.directory)), **directory_digests(args.directory)}
    manifest = catalog.commit(stored, args.user, adapter, provenance={"imported": source})
    if args.json:
        write_text(args.json, json.dumps(manifest.to_dict(), indent=2) + "\n")
    print(f"{manifest.shown}: {config.method} of {len(cohort.specs)} sites, base {base.digest[:12]}")
    return 0
