"""Collectives of a compiled program: which mesh axes each one crosses, and how many bytes it brings to a device."""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from popax.plan.hlo import Computation, Instruction, Module, visits

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
    "ragged-all-to-all",
)  # fmt: skip
# Between slices: not instructions of the program's devices, but transfers that the hosts carry out.
DCN = "dcn"
# Of one user: the scalars of a step's metrics (loss, norm, rate, counts). An adapter's smallest factor is larger.
SCALAR_BYTES = 32
Pairs = tuple[tuple[int, int], ...]


class Collective(NamedTuple):
    """axes: the mesh axes along which it moves data, DCN between slices; () where every group is one device.
    payload_bytes: its largest operand or result on a device, of one call. times: calls in one run. crossed_bytes: what
    a device receives in one run, by the ring algorithm. op_name: where the program asked for it."""

    opcode: str
    axes: tuple[str, ...]
    payload_bytes: int
    times: int
    crossed_bytes: int
    op_name: str


def collectives(module: Module, mesh: Mapping[str, int]) -> list[Collective]:
    """Every collective that runs; mesh: of one slice, whose devices the program numbers.

    The pieces into which a TPU cuts an asynchronous one share its channel: one entry.
    """
    found: dict[tuple[str, ...], tuple[bool, Collective]] = {}
    for visit in visits(module):
        instruction = visit.instruction
        opcode = instruction.opcode.removesuffix("-start")
        if opcode == "recv" and "xla_megascale_runtime" in instruction.text:
            found["dcn", instruction.name] = (False, _between_slices(instruction, visit.times))
        if opcode not in COLLECTIVES:
            continue
        channel = re.search(r"channel_id=(\d+)", instruction.text)
        # Outside fusions every instruction is a call of its own, whatever channel it shares.
        key = ("channel", channel.group(1)) if channel and visit.fused else ("name", instruction.name)
        sources = [visit.computation.instructions[name] for name in instruction.operands]
        one = _collective(opcode, instruction, sources, mesh, visit.times)
        found[key] = max(found.get(key, (False, one)), (_starts(visit.computation), one), key=_first_then_most)
    return [one for _, one in found.values()]


def _starts(computation: Computation) -> bool:
    """Whether an asynchronous collective begins here; its other pieces may lie inside loops that it outlasts."""
    return any("AsyncCollectiveStart" in each.text for each in computation.instructions.values())


def _first_then_most(candidate: tuple[bool, Collective]) -> tuple[bool, int]:
    return candidate[0], candidate[1].times


def by_axes(found: Iterable[Collective]) -> dict[str, int]:
    """{"fsdp": bytes that a device receives in one run, "fsdp+tensor": ...}, the largest first."""
    totals: dict[str, int] = {}
    for one in found:
        if one.axes:
            name = "+".join(one.axes)
            totals[name] = totals.get(name, 0) + one.crossed_bytes
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def crossing(found: Iterable[Collective], axis: str, users: int) -> list[Collective]:
    """Those that move more than scalar metrics of the users along the axis."""
    return [one for one in found if axis in one.axes and one.payload_bytes > SCALAR_BYTES * users]


def _collective(
    opcode: str, instruction: Instruction, sources: Sequence[Instruction], mesh: Mapping[str, int], times: int
) -> Collective:
    if opcode == "collective-permute":
        pairs = source_target_pairs(instruction.text)
        axes, group = axes_of_pairs(pairs, mesh), 2 if any(a != b for a, b in pairs) else 1
    else:
        groups = replica_groups(instruction.text, math.prod(mesh.values()))
        axes, group = axes_of_groups(groups, mesh), max(len(each) for each in groups)
    sent = sum(source.nbytes for source in sources)
    payload = max(sent, *(shape.nbytes for shape in instruction.shapes))
    name = re.search(r'op_name="([^"]*)"', instruction.text)
    return Collective(
        opcode, axes, payload, times, times * received_bytes(opcode, sent, group), name.group(1) if name else ""
    )


def _between_slices(instruction: Instruction, times: int) -> Collective:
    """What a device receives from those in its place on other slices; the hosts have summed what is to be summed."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.text)
    rendezvous = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.text)
    payload = instruction.shapes[0].nbytes
    opcode = kind.group(1).lower().replace("_", "-") if kind else "recv"
    return Collective(opcode, (DCN,), payload, times, times * payload, rendezvous.group(1) if rendezvous else "")


def received_bytes(opcode: str, sent: int, group: int) -> int:
    """Bytes that reach one device of a ring of `group`, each of which gives an operand of `sent` bytes.

    all-gather (g - 1) sent; reduce-scatter and all-to-all (g - 1)/g sent; all-reduce, being one after the other of
    the first two on 1/g, 2 (g - 1)/g sent; a permutation or broadcast sent.
    """
    if group <= 1:
        return 0
    factor = {
        "all-gather": group - 1,
        "reduce-scatter": (group - 1) / group,
        "all-to-all": (group - 1) / group,
        "ragged-all-to-all": (group - 1) / group,
        "all-reduce": 2 * (group - 1) / group,
        "collective-permute": 1,
        "collective-broadcast": 1,
    }[opcode]
    return round(factor * sent)


def replica_groups(text: str, devices: int) -> list[list[int]]:
    """The groups of an instruction, in any of the compiler's spellings.

    {{0,1},{2,3}}; [2,4]<=[8], rows of an iota; [4,2]<=[2,4]T(1,0), rows of a reshaped and transposed one;
    mesh['x'=2,'y'=4], device_ids=(...) {'y'}, the named axes of a mesh; {} or nothing, all devices in one group.
    """
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?[^)]*)\))? \{([^}]*)\}", text)
    if named:
        return _mesh_groups(*named.groups())
    iota = re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if iota:
        return _iota(iota.group(1)).tolist()
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", text)
    if listed:
        return [_integers(group) for group in re.findall(r"\{([\d,]*)\}", listed.group(1))]
    return [list(range(devices))]


def source_target_pairs(text: str) -> Pairs:
    """((source, target), ...) of a collective-permute."""
    listed = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)
    pairs = re.findall(r"\{(\d+),(\d+)\}", listed.group(1)) if listed else []
    return tuple((int(source), int(target)) for source, target in pairs)


def axes_of_groups(groups: Iterable[Sequence[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes on which members of one group differ, in the mesh's order."""
    return axes_of_pairs(((group[0], other) for group in groups for other in group), mesh)


def axes_of_pairs(pairs: Iterable[tuple[int, int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes on which source and target differ; a device's number is its place in the mesh, row-major."""
    sizes = tuple(mesh.values())
    differs = np.zeros(len(sizes), bool)
    for source, target in pairs:
        differs |= np.array(np.unravel_index(source, sizes)) != np.array(np.unravel_index(target, sizes))
    return tuple(itertools.compress(mesh, differs))


def _mesh_groups(axes: str, device_ids: str | None, over: str) -> list[list[int]]:
    """{'y'} is a whole axis; {'x':(m)k} is the digit of size k that stands after digits of size m of the axis x."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values())) if device_ids is None else _iota(device_ids)
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, device in enumerate(ids.reshape(-1).tolist()):
        kept = dict(zip(sizes, map(int, np.unravel_index(place, tuple(sizes.values()))), strict=True))
        for name, before, digit in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", over):
            size = int(digit or sizes[name])
            after = sizes[name] // (int(before or 1) * size)
            kept[name] -= kept[name] // after % size * after
        groups.setdefault(tuple(kept.values()), []).append(device)
    return list(groups.values())


def _iota(text: str) -> np.ndarray:
    """[2,4]<=[8], [4,2]<=[2,4]T(1,0), or [2,2]T(1,0): a reshaped, transposed and again reshaped iota."""
    target, _, source = text.partition("<=") if "<=" in text else ("", "", text)
    shape = _integers(re.findall(r"\[([\d,]+)\]", source)[0])
    numbers = np.arange(math.prod(shape)).reshape(shape)
    permuted = re.search(r"T\(([\d,]+)\)", source)
    if permuted:
        numbers = numbers.transpose(_integers(permuted.group(1)))
    return numbers.reshape(_integers(target.strip("[] "))) if target else numbers


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
