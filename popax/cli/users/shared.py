"""What the commands of `popax users` have in common: arguments, lines, and counting on the screen."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from popax.atomic import write_text
from popax.cli.keys import signer_of, trust_of

if TYPE_CHECKING:
    from popax.store.bases import Fitted
    from popax.store.catalog import Catalog
    from popax.store.manifest import UserRecord
    from popax.store.pointers import Which


def add_catalog(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("catalog", help="the catalog's directory or URL")


def add_user(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("user", help="the user's id")


def add_revision(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--revision", metavar="WHICH", help=f"a number, latest, promoted, or a tag (default: {default})"
    )


def add_filters(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of UserFilter."""
    parser.add_argument("--prefix", default="", help="only users whose id starts with this")
    parser.add_argument("--base", metavar="DIGEST", help="only adapters of this base (its digest, or the start of it)")
    parser.add_argument("--cohort", metavar="ID", help="only adapters of this cohort (its id, or the start of it)")
    parser.add_argument("--method", help="only adapters of this method, such as lora")
    parser.add_argument(
        "--status", choices=("promoted", "candidate"), help="only users whose latest revision is served, or is not"
    )
    parser.add_argument("--tag", help="only users with this tag")
    parser.add_argument("--basis", metavar="DIGEST", help="only rows that are written in this basis (or its start)")
    parser.add_argument("--since", metavar="TIME", help="only users whose latest revision is not older (UTC, ISO 8601)")
    parser.add_argument("--until", metavar="TIME", help="only users whose latest revision is older (UTC, ISO 8601)")


def filters_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of UserFilter."""
    names = ("prefix", "base", "cohort", "method", "status", "tag", "basis", "since", "until")
    return {name: getattr(args, name) for name in names}


def open_catalog(args: argparse.Namespace, *, write: bool = False) -> "Catalog":
    """The catalog, with the keys of --sign and --trust where the command has them."""
    from popax.store.catalog import Catalog

    return Catalog.open(args.catalog, read_only=not write, signer=signer_of(args), trusted=trust_of(args))


def which(text: str | None) -> "Which":
    """What --revision names."""
    return int(text) if text is not None and text.isascii() and text.isdigit() else text


def printable(user: str) -> str:
    """The id for a screen: it may hold anything, a terminal's control sequences included."""
    return user if user.isprintable() else ascii(user)


def user_line(record: "UserRecord") -> str:
    """One user's pointers."""
    promoted = f", promoted @{record.promoted}" if record.promoted else ""
    tags = "".join(f", {name} @{at}" for name, at in sorted(record.tags.items()))
    return f"{printable(record.user)}@{record.latest}{promoted}{tags}"


def fitted_line(basis: "Fitted") -> str:
    """What a basis holds of a user, and how to find who is written in it."""
    name = f"{printable(basis.user)}@{basis.revision}"
    return f"  the basis {basis.digest[:16]} was fitted on {name}: popax users list --basis {basis.digest[:16]}"


def write_json(args: argparse.Namespace, value: Any) -> None:
    """`value` where --json asks for it."""
    if args.json:
        write_text(args.json, json.dumps(value, indent=2) + "\n")


def metrics_text(metrics: Mapping[str, Any]) -> str:
    return "".join(f" {name}={_short(value)}" for name, value in sorted(metrics.items()))


def counting(what: str) -> Callable[[int], None]:
    """progress(count) -> one line on stderr that counts, where a person watches."""
    if not sys.stderr.isatty():
        return lambda count: None
    return lambda count: print(f"\r{count:,} {what}", end="", file=sys.stderr, flush=True)


def table(rows: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> None:
    """Names and values, aligned."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}s}  {value}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
