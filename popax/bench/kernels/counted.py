"""Every op, spec and implementation through the TPU compiler: rows, and the defaults that follow from them."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from popax.bench.kernels import aot, tuned
from popax.kernels import tuning
from popax.kernels.op import Op
from popax.kernels.table import OPS

KERNEL = "pallas_tpu"
DTYPE = jnp.bfloat16
# A loop's body is counted once, however often it runs: an op whose XLA form loops has the same unrolled, for counting.
XLA_FORMS = ("xla_unrolled", "xla")
# A kernel must be ahead by more than what the two countings may differ by in parts that they share.
AHEAD = 0.99
FLOPS_ALLOWED = 1.05


def select(ops: str = "", specs: str = "") -> Iterable[tuple[Op, Any]]:
    """The table's (op, spec) whose names match the regular expressions."""
    for op in OPS:
        for spec in op.specs:
            if re.search(ops, op.name) and re.search(specs, spec.name):
                yield op, spec


def rows(
    topology: str,
    *,
    ops: str = "",
    specs: str = "",
    implementations: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """One row for each op, spec and implementation: counts and ratios, or the reason why there are none."""
    mesh = aot.one_device(topology)
    found = []
    for op, spec in select(ops, specs):
        forms = {"xla": op.implementations["xla"]}
        forms |= {name: call for name, call in op.implementations.items() if name == KERNEL} | dict(op.rivals)
        for name, call in forms.items():
            if re.search(implementations, name):
                found.append(_row(topology, mesh, op, spec, name, call))
                say(line(found[-1]))
    return found


def _row(topology: str, mesh, op: Op, spec: Any, name: str, call: Callable[..., Any]) -> dict[str, Any]:
    operands, floor = op.operands(spec, DTYPE), op.cost(spec, DTYPE)
    row = {
        "topology": topology,
        "device_kind": mesh.devices.flat[0].device_kind,
        "op": op.name,
        "spec": spec.name,
        "implementation": name,
        "floor_bytes": floor.bytes,
        "floor_flops": floor.flops,
    }
    try:
        counted = aot.count(call, operands, mesh, op.donated)
    except NotImplementedError as error:
        return row | {"skipped": str(error)}
    except Exception as error:
        # Whatever the compiler says is the row's result: a table with a hole and its reason, not half a table.
        return row | {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
    return row | {
        "held_bytes": counted.argument_bytes + counted.temporary_bytes,
        "held_over_logical": counted.held_over_logical,
        "vmem_bytes": counted.vmem_bytes,
        "bytes": counted.bytes,
        "staged_bytes": counted.staged_bytes,
        "flops": counted.flops,
    }


def line(row: dict[str, Any]) -> str:
    """A row as a person reads it."""
    head = f"{row['topology']:12s} {row['op']:24s} {row['spec']:36s} {row['implementation']:14s}"
    if "bytes" not in row:
        return f"{head} {row.get('skipped') or row['failed']}"
    return (
        f"{head} bytes {row['bytes'] / row['floor_bytes']:6.2f}x flops {row['flops'] / row['floor_flops']:6.2f}x "
        f"held {row['held_over_logical']:5.2f}x VMEM {row['vmem_bytes'] / 2**20:5.1f} MiB"
    )


def prefer(kernel: dict[str, Any], xla: dict[str, Any]) -> bool:
    """Whether the kernel is the default: fewer counted bytes than XLA's form, and no more work.

    bytes < 0.99 x XLA's and FLOPs <= 1.05 x XLA's. There is no clock on this road, hence the basis "counted".
    """
    if "bytes" not in kernel:
        return False
    if "bytes" not in xla:
        return True
    return kernel["bytes"] < AHEAD * xla["bytes"] and kernel["flops"] <= FLOPS_ALLOWED * xla["flops"]


def tuned_rows(counted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a tuned file, one for each op and spec that has both forms among `counted` (of one device kind)."""
    specs = {(op.name, spec.name): (op, spec) for op in OPS for spec in op.specs}
    by_key = {(row["op"], row["spec"], row["implementation"]): row for row in counted}
    made = []
    for (op, name, implementation), kernel in by_key.items():
        xla = next((row for form in XLA_FORMS if (row := by_key.get((op, name, form)))), None)
        if implementation != KERNEL or xla is None:
            continue
        keep = ("bytes", "flops", "skipped", "failed")
        forms = ((KERNEL, kernel), ("xla", xla))
        why = {form: {key: row[key] for key in keep if key in row} for form, row in forms}
        made.append(tuned.row(*specs[op, name], DTYPE, KERNEL if prefer(kernel, xla) else "xla", None, why))
    return made


def write_tuned(counted: list[dict[str, Any]], root: Path = tuning.ROOT) -> list[Path]:
    """Writes <op>/tuned/<device kind>.json for every kind among the rows; rows of other ops and specs are kept."""
    written = []
    for kind in sorted({row["device_kind"] for row in counted}):
        made = tuned_rows([row for row in counted if row["device_kind"] == kind])
        written += tuned.write(kind, "counted", made, root)
    return written
