"""Keys on the command line: who signs what a command commits, and whose revisions a command uses."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from popax.store.signing import Signer, Trust


def add_sign(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sign", metavar="KEY.pem", help="sign the revisions with this Ed25519 private key")


def add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="KEY.pem",
        help="use only revisions signed with this Ed25519 public key's pair (repeatable; default: ask for none)",
    )


def signer_of(args: argparse.Namespace) -> "Signer | None":
    from popax.store.signing import Signer

    return Signer.from_pem(path) if (path := getattr(args, "sign", None)) else None


def trust_of(args: argparse.Namespace) -> "Trust | None":
    from popax.store.signing import Trust

    return Trust.from_pem(*paths) if (paths := getattr(args, "trust", None)) else None
