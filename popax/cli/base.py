"""--base and --quantise, as every command that reads a base takes them."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from popax.modeling.base import Base


def add_base(parser: argparse.ArgumentParser, what: str, *, serves: bool = True) -> None:
    """what: the help of --base. serves: adapters that another run made may be used as well."""
    parser.add_argument("--base", required=True, metavar="DIR", help=what)
    parser.add_argument(
        "--quantise",
        metavar="WHICH",
        help="round the base's linear maps while they are read: int8, fp8, int4, or one of them with :GROUP",
    )
    if serves:
        parser.add_argument(
            "--unquantised_adapters",
            action="store_true",
            help="with --quantise: take adapters that were made for the base as it is stored, not for the rounded one",
        )


def base_of(args: argparse.Namespace, mesh: "Mesh | None" = None) -> "Base":
    """The base that the flags of `add_base` name."""
    from popax.errors import ConfigError
    from popax.modeling.base import load_base

    as_stored = getattr(args, "unquantised_adapters", False)
    if as_stored and args.quantise is None:
        raise ConfigError("--unquantised_adapters is for a base that --quantise rounds: give both, or neither")
    return load_base(args.base, quantise=args.quantise, keep_digest=as_stored, mesh=mesh)
