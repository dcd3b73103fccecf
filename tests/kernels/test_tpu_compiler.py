"""Every kernel through the real TPU compiler, for five kinds of TPU that are not attached.

For each kind another shape of each op, by rank. `make accept-kernels` compiles every shape for every kind, which takes
a core the better part of an hour.
"""

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from popax.bench.kernels.environment import TOPOLOGIES
from popax.kernels.table import OPS
from tests.sizes import whole

pytestmark = [
    pytest.mark.aot,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'popax[aot]'"
    ),
]
# Of these the floors are compared: on one kind, on every kind where the size is whole.
GROWING = {
    "indexed_lora.decode": "qwen3_8b_q_256_in_{distinct}_of_{slots}_r16",
    "indexed_lora.grouped": "qwen3_8b_q_proj_8192_over_{slots}_r16",
    "indexed_lora.grouped_backward": "qwen3_8b_q_proj_8192_over_{slots}_r16",
}
GROWN_ON = "v5e:2x2"
# Why a kernel may leave a shape to XLA; any other reason fails.
REASONS = ("rank 1", "bytes of VMEM", "a matrix gathered for every row", "g would be copied into whole lanes")
# On the kind with 16 MiB of vector memory the widest backward sums stay with XLA.
MOST_SKIPPED = 0.12


def _chosen(topology):
    """The names of the shapes that are compiled for a kind."""
    own = TOPOLOGIES.index(topology)
    every = [spec.name for op in OPS for spec in op.specs]
    # XLA's own sums are what rank 1 is given: nothing would be compiled.
    above = [[spec for spec in op.specs if getattr(spec, "rank", 0) != 1] for op in OPS]
    by_rank = [sorted(specs, key=lambda spec: getattr(spec, "rank", 0)) for specs in above]
    dealt = [specs[own * (len(specs) - 1) // (len(TOPOLOGIES) - 1)].name for specs in by_rank]
    growing = [name.format(distinct=min(slots, 256), slots=slots) for name in GROWING.values() for slots in (8, 4096)]
    return set(every if whole() else [*dealt, *(growing if topology == GROWN_ON else [])])


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_op_and_spec(topology, tmp_path):
    """One test a topology, since its report is what takes the time: compiled or skipped for a reason, memory, slots."""
    path, chosen = tmp_path / "report.json", _chosen(topology)
    command = [sys.executable, "-m", "popax.bench.kernels", "--topology", topology, "--json", str(path)]
    command += ["--implementations", "pallas", "--specs", f"^({'|'.join(map(re.escape, sorted(chosen)))})$"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(path.read_text())["rows"]
    ops = [op for op in OPS if "pallas_tpu" in op.implementations]
    wanted = {(op.name, spec.name) for op in ops for spec in op.specs if spec.name in chosen}
    assert {(row["op"], row["spec"]) for row in rows} == wanted
    assert {op for op, _ in wanted} == {op.name for op in ops}

    assert [row for row in rows if "failed" in row] == []
    skipped = [row for row in rows if "skipped" in row]
    assert [row for row in skipped if not any(reason in row["skipped"] for reason in REASONS)] == []
    assert len(skipped) <= max(2, MOST_SKIPPED * len(rows))
    assert _held_too_much(rows) == {}
    if whole() or topology == GROWN_ON:
        assert _grown_with_slots(rows) == []


def _held_too_much(rows):
    """No padding of ranks, no gathered copy: arguments + temporaries <= 1.15 x the operands.

    Toys aside: they are 64 columns wide, half of the lanes.
    """
    held = {(row["op"], row["spec"]): row["held_over_logical"] for row in rows if "bytes" in row}
    return {key: value for key, value in held.items() if value > 1.15 and "toy" not in key[1]}


def _grown_with_slots(rows):
    """8 -> 4,096 slots: declared and counted FLOPs and bytes of decode and of grouped rows within 5%.

    The pool's own gradient, which JAX wants whole, is what grows in the backward: its bytes are in the floor.
    """
    grown = []
    for op, name in GROWING.items():
        names = [name.format(distinct=min(slots, 256), slots=slots) for slots in (8, 4096)]
        few, many = ({row["spec"]: row for row in rows if row["op"] == op}[each] for each in names)
        results = many["floor_bytes"] - few["floor_bytes"] if op.endswith("backward") else 0
        if many["flops"] > 1.05 * few["flops"] or many["bytes"] - results > 1.05 * few["bytes"]:
            grown.append((few, many))
    return grown
