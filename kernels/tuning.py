"""Which implementation runs on a shape, and with which blocks: JSON files that `popax bench kernels --tune` writes.

`kernels/<op>/tuned/<device kind>.json`: {"device_kind", "basis", "date", "commit", "versions", "rows"}. basis is
"measured" (seconds on that device) or "counted" (the TPU compiler's bytes and FLOPs, where there is no clock). A row:
{"op", "dtype", "spec": {...}, "implementation", "blocks": {...} or null, "why": {...}}.
"""

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent
# A shape this far from every tuned one (the sum of |log2| of its dimensions' ratios) is nobody's neighbour.
FARTHEST = 8.0


class Choice(NamedTuple):
    """implementation: the one to try first. blocks: its block sizes by name, or None for its own choice."""

    implementation: str
    blocks: dict[str, int] | None


def slug(device_kind: str) -> str:
    """A file name for a device kind: "TPU v5 lite" -> "tpu_v5_lite"."""
    return "".join(letter if letter.isalnum() else "_" for letter in device_kind.lower()).strip("_")


@functools.cache
def rows(op: str, device_kind: str) -> tuple[dict[str, Any], ...]:
    """The tuned rows of "folder.pass" on a device kind; none where no file names it."""
    path = ROOT / op.split(".")[0] / "tuned" / f"{slug(device_kind)}.json"
    if not path.exists():
        return ()
    return tuple(row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if row["op"] == op)


def choose(op: str, device_kind: str, spec: Any, dtype: str) -> Choice | None:
    """The tuned row whose shape is nearest to spec's; None where nothing near was tuned.

    spec: a NamedTuple; its integers are the dimensions, everything else must be equal. Nearest: the least sum over
    dimensions of |log2(ratio)|. Blocks are taken over from an exact match of the shape only: another shape's may not
    fit.
    """
    wanted = spec._asdict()
    best, least = None, FARTHEST
    for row in rows(op, device_kind):
        distance = _distance(wanted, row["spec"]) if row["dtype"] == dtype else math.inf
        if distance < least:
            best, least = row, distance
    if best is None:
        return None
    return Choice(best["implementation"], best["blocks"] if least == 0.0 else None)


def _distance(wanted: dict[str, Any], tuned: dict[str, Any]) -> float:
    return sum(_apart(value, tuned.get(name)) for name, value in wanted.items() if name != "name")


def _apart(value: Any, other: Any) -> float:
    """|log2(ratio)| of two dimensions, the sum of it over two lists of them; infinite for other values that differ."""
    if isinstance(value, tuple) and isinstance(other, list) and len(value) == len(other):
        return sum(_apart(*pair) for pair in zip(value, other, strict=True))
    if isinstance(value, int) and isinstance(other, int) and not isinstance(value, bool):
        return abs(math.log2(max(value, 1) / max(other, 1)))
    return 0.0 if value == other else math.inf
