"""`popax remember`: what a user's adapter keeps of a text that it has read, as the user's next revision."""

import argparse

from popax.cli.base import add_base, base_of
from popax.cli.keys import add_sign, add_trust, signer_of, trust_of
from popax.cli.main import add_json
from popax.cli.users.shared import counting, printable, which, write_json

NAME = "remember"
HELP = "Let a user's adapter read a text, and begin from what it remembers of it (methods with a memory: delta_mem)."
EXAMPLE = "popax remember runs/irc/catalog ada --base runs/irc_base/base --file talk.txt"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("catalog", help="the catalog's directory or URL")
    parser.add_argument("user", metavar="USER[@REVISION]", help="whose adapter reads (default: the latest revision)")
    add_base(parser, "the base that the adapters were made for")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="TEXT", help="what is read")
    what.add_argument("--file", metavar="PATH", help="a file of it, in UTF-8; longer than the context is no matter")
    what.add_argument("--forget", action="store_true", help="read nothing, and forget what was remembered")
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer's path, or byte (default: the base's)")
    add_sign(parser)
    add_trust(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from popax.adapters.base import AdapterConfig
    from popax.data.tokenize import load_tokenizer
    from popax.errors import CatalogError
    from popax.serving.pool import parse_request
    from popax.serving.remember import check_memory, remember
    from popax.serving.text import encode_prompt
    from popax.store.catalog import Catalog

    text = None if args.forget else _text(args)
    catalog = Catalog.open(args.catalog, signer=signer_of(args), trusted=trust_of(args))
    request = parse_request(args.user, catalog, which(None))
    if request.user is None:
        raise CatalogError("base remembers nothing: name a user of the catalog")
    [manifest] = catalog.resolve([(request.user, request.revision)])
    check_memory(AdapterConfig.from_dict(manifest.config))  # before a base is loaded for nothing
    base = base_of(args)
    tokens = None
    if text is not None:
        tokens = encode_prompt(load_tokenizer(args.tokenizer or args.base), text)
    made = remember(base, catalog, manifest, tokens, counting("tokens read"))
    write_json(args, {"revision": made.to_dict()})
    read = "nothing" if tokens is None else f"{len(tokens):,} tokens"
    print(
        f"{printable(made.shown)}: {printable(manifest.shown)} with what is left of {read}. It is a candidate: popax "
        "eval scores it"
    )
    return 0


def _text(args: argparse.Namespace) -> str:
    from pathlib import Path

    from popax.errors import DataError

    text = args.text
    if args.file is not None:
        try:
            text = Path(args.file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--file {args.file}: {error}") from error
    if not text:
        raise DataError("the text is empty: there is nothing to read (--forget makes a user forget)")
    return text
