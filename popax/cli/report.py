"""`popax report`: Markdown tables from the JSON files that measuring commands wrote."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from popax.atomic import write_text
from popax.errors import ConfigError

NAME = "report"
HELP = "Make Markdown tables from the JSON that bench, eval and demo write."
EXAMPLE = "popax report bench.json demo.json --output docs/numbers.md"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reports", nargs="+", metavar="REPORT", help="a file that a command wrote with --json")
    parser.add_argument("--output", metavar="PATH", help="write there instead of printing")
    parser.add_argument("--rows", type=int, default=20, metavar="N", help="rows shown of a table (default 20, 0: none)")


def run(args: argparse.Namespace) -> int:
    from popax.bench.report import read_report

    parts = []
    for path in args.reports:
        try:
            parts.append("\n".join(markdown(read_report(path), args.rows)))
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
    text = "\n\n".join(parts)
    if args.output is None:
        print(text)
        return 0
    write_text(args.output, text + "\n")
    return 0


def markdown(report: Mapping[str, Any], max_rows: int) -> Iterator[str]:
    """One report as Markdown lines: where it was measured, its figures, and its first rows."""
    device = report["device"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    yield f"### {report['name']}"
    yield ""
    yield f"Commit {report['commit']}; {device['count']} x {device['kind']}; {versions}."
    yield ""
    yield from _table(["figure", "value"], [[name, value] for name, value in report["figures"].items()])
    rows = report["rows"]
    if not rows or max_rows <= 0:
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    yield ""
    yield from _table(columns, [[row.get(name) for name in columns] for row in rows[:max_rows]])
    if len(rows) > max_rows:
        yield ""
        yield f"The first {max_rows} of {len(rows)} rows."


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(_cell(value) for value in row) + " |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", r"\|").replace("\n", " ")
