"""One timed run: ceilings first, then the plan until the budget is spent, with the report whole after every shape."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from popax.bench.kernels import clock, composite, timed, tuned
from popax.bench.kernels.timed import Wish
from popax.bench.report import write_report
from popax.kernels import target, tuning
from popax.kernels.op import Op
from popax.kernels.table import OPS

__all__ = ["Wish", "timed_report"]

# Of the memory that the device has: operands of every form, results and XLA's temporaries must all find room.
SHARE = 4
HOST_MEMORY = 2 << 30


def timed_report(
    wish: Wish,
    deadline: float,
    *,
    repeats: int,
    round_s: float,
    json_path: Path | None = None,
    tuned_root: Path | None = None,
    ops: Iterable[Op] = OPS,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures until time.monotonic() == deadline and returns the figures; writes the report after every shape.

    A run that is killed leaves the rows and the tuned defaults of all the shapes that it finished.
    """
    memory = _memory()
    limits = clock.Limits(memory, repeats, round_s)
    ceilings = clock.ceilings(memory, timed.DTYPE)
    figures: dict[str, Any] = {
        "copy_bytes_per_s": ceilings.bytes_per_s,
        "matmul_flops_per_s": ceilings.flops_per_s,
    }
    say(f"copy {ceilings.bytes_per_s / 1e9:.1f} GB/s, matmul {ceilings.flops_per_s / 1e12:.2f} TFLOP/s")
    config = {**wish._asdict(), "limits": limits._asdict(), "dtype": jnp.dtype(timed.DTYPE).name}
    rows: list[dict[str, Any]] = []
    for op, spec, found in timed.measure(wish, limits, deadline, ceilings=ceilings, ops=ops, say=say):
        rows += found
        figures |= _counts(rows) | composite.figures(rows)
        # What the budget left out changes the report once, at the end.
        if json_path and not all("left_out" in row for row in found):
            write_report(json_path, name="bench kernels", config=config, figures=figures, rows=rows)
        best = timed.tuned_row(op, spec, found) if wish.tune else None
        if best:
            tuned.write(target.device_kind(), "measured", [best], tuned_root or tuning.ROOT)
    if json_path:
        write_report(json_path, name="bench kernels", config=config, figures=figures, rows=rows)
    return figures


def _counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    reasons = ("skipped", "failed", "left_out")
    return {"measured": sum("seconds" in row for row in rows)} | {
        reason: sum(reason in row for row in rows) for reason in reasons
    }


def _memory() -> int:
    statistics = jax.devices()[0].memory_stats() or {}
    return statistics.get("bytes_limit", SHARE * HOST_MEMORY) // SHARE
