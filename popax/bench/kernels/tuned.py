"""Tuned files as `popax.kernels.tuning` reads them, written from counts or from measured times."""

import datetime
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from popax.atomic import write_text
from popax.bench.report import versions
from popax.kernels import tuning
from popax.kernels.op import Op
from popax.version import commit


def row(op: Op, spec: Any, dtype: Any, implementation: str, blocks: Any, why: Mapping[str, Any]) -> dict[str, Any]:
    """One row: on this shape, this implementation with these blocks (a NamedTuple, or None), and why."""
    return {
        "op": op.name,
        "dtype": jnp.dtype(dtype).name,
        "spec": {field: value for field, value in spec._asdict().items() if field != "name"},
        "implementation": implementation,
        "blocks": None if blocks is None else dict(blocks._asdict()),
        "why": dict(why),
    }


def write(kind: str, basis: str, rows: Iterable[Mapping[str, Any]], root: Path = tuning.ROOT) -> list[Path]:
    """Writes <op's folder>/tuned/<device kind>.json; rows of other ops, dtypes and specs that are there are kept.

    basis: "measured" or "counted". A measured row is never replaced by a counted one.
    """
    by_folder: dict[str, list[Mapping[str, Any]]] = {}
    for each in rows:
        by_folder.setdefault(each["op"].split(".")[0], []).append(each)
    written = []
    for folder, mine in sorted(by_folder.items()):
        path = root / folder / "tuned" / f"{tuning.slug(kind)}.json"
        _merge(path, kind, basis, mine)
        written.append(path)
    tuning.rows.cache_clear()
    return written


def _merge(path: Path, kind: str, basis: str, new: list[Mapping[str, Any]]) -> None:
    """One row a line; whole or absent."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"basis": basis, "rows": []}
    if old["basis"] == "measured" and basis != "measured":
        return
    # A count says nothing beside a clock: measured rows do not share a file with counted ones.
    kept = old["rows"] if old["basis"] == basis else []
    rows = {_key(each): each for each in (*kept, *new)}
    head = {
        "device_kind": kind,
        "basis": basis,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "versions": versions(),
    }
    body = ",\n".join("  " + json.dumps(rows[each]) for each in sorted(rows))
    text = json.dumps(head)[:-1] + ', "rows": [\n' + body + "\n]}\n"
    write_text(path, text)


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["op"], row["dtype"], json.dumps(row["spec"])
