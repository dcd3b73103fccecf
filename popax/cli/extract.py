"""`popax extract`: one user's adapter, out of a catalog or a training checkpoint, as a PEFT directory."""

import argparse
import json
import os

from popax.atomic import write_text
from popax.cli.keys import add_trust, trust_of
from popax.cli.main import add_json
from popax.cli.users.shared import which

NAME = "extract"
HELP = "Write one user's adapter as a Hugging Face PEFT directory, reading that user's bytes only."
EXAMPLE = "popax extract runs/irc/catalog ada ada-peft --base_name meta-llama/Llama-3.2-1B"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a catalog, a run's checkpoint directory (its latest step), or one step of it")
    parser.add_argument("user", help="the user's id")
    parser.add_argument("directory", help="the PEFT directory to write")
    parser.add_argument(
        "--revision", metavar="WHICH", help="of the catalog: a number, latest (default), promoted, or a tag"
    )
    parser.add_argument("--base_name", default="", metavar="NAME", help="the base's path or name, for peft to load")
    parser.add_argument("--overwrite", action="store_true", help="replace a PEFT directory that is there")
    add_trust(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    # The bytes go from disk to disk: an accelerator, even if idle, need not be woken for them.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from popax.adapters.peft import save_peft
    from popax.store.extract import extract_user

    found = extract_user(args.source, args.user, revision=which(args.revision), trusted=trust_of(args))
    directory = save_peft(
        args.directory,
        found.adapter,
        config=found.config,
        specs=found.specs,
        shared=found.shared,
        base_name=args.base_name,
        overwrite=args.overwrite,
    )
    if args.json:
        record = {"directory": str(directory), "config": found.config.to_dict(), "provenance": found.provenance}
        write_text(args.json, json.dumps(record, indent=2) + "\n")
    print(
        f"{directory}: {found.config.method} of {len(found.specs)} sites, base {found.provenance['base_digest'][:12]}"
    )
    return 0
