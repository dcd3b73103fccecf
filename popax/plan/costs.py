"""Work of a compiled program on one device: matrix FLOPs and bytes that pass through HBM, loops counted as they run.

The compiler's own `cost_analysis` counts the body of a loop once, so that a scan over 61 layers looks like one layer.
"""

import math
import re
from typing import NamedTuple

from popax.plan.collectives import COLLECTIVES
from popax.plan.hlo import HBM, Computation, Instruction, Module, Shape, called, visits

# Names and views of what is already there, and the ends of transfers that were counted when they began.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "copy-done", "slice-done", "async-done", "async-update", "opt-barrier", "domain",
}  # fmt: skip
# Asynchronous ones, whose first two results are the destination and the source, in either order.
TRANSFERS = {"copy-start", "slice-start"}
PARTIAL_READS = {"dynamic-slice", "slice", "gather"}
# Written in place, and the operand that holds what is written.
IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}
PASSED_ON = {"tuple", "bitcast", "custom-call", *COLLECTIVES}
ALIASED = "output_to_operand_aliasing={{}: (0, {})}"
# What the compiler calls the kernel that it makes of `jax.lax.ragged_dot`.
GROUPED = "ragged-dot"
VIEWS = ("ConcatBitcast", "AllocateBuffer", "AsyncCollective", "GatherScatterIndicesBitpacked", "AssumeGatherIndices")


class Costs(NamedTuple):
    """matmul_flops: of every product, 2 a multiply-add, and what kernels declare; recomputed_flops: those of them that
    repeat the forward pass for the backward pass (remat). hbm_bytes: read from HBM and written to it. accessed_bytes:
    what instructions read and write in any memory, without transfers between memories: the program's own, where
    hbm_bytes also has what the compiler chose to keep in VMEM, and when."""

    matmul_flops: int
    recomputed_flops: int
    hbm_bytes: int
    accessed_bytes: int


def count(module: Module, filled: float = 1.0) -> Costs:
    """Over one run of the program. filled: the part of a grouped product's rows that its groups are expected to fill;
    the kernel declares all rows of its operand, which has room for the worst case, and skips those of no group."""
    flops = recomputed = 0
    for visit in visits(module):
        computation, instruction = visit.computation, visit.instruction
        if instruction.opcode in ("convolution", "dot", "custom-call"):
            kernel = instruction.opcode == "custom-call"
            own = declared(instruction, "flops") if kernel else product_flops(computation, instruction)
            own = round(own * filled) if kernel and GROUPED in instruction.name else own
            flops += visit.times * own
            recomputed += visit.times * own * ("rematted_computation" in instruction.text)
    return Costs(flops, recomputed, _total_traffic(module), _total_traffic(in_one_memory(module)))


def in_one_memory(module: Module) -> Module:
    """The program of a device that has nothing but HBM: transfers between memories become views of what is there."""

    def moved(instruction: Instruction) -> Instruction:
        between = len({shape.memory_space for shape in instruction.shapes[:2]}) == 2
        opcode = "bitcast" if between and instruction.opcode in TRANSFERS else instruction.opcode
        shapes = tuple(shape._replace(memory_space=HBM) for shape in instruction.shapes)
        return instruction._replace(opcode=opcode, shapes=shapes)

    def of(computation: Computation) -> Computation:
        return Computation(computation.name, {name: moved(each) for name, each in computation.instructions.items()})

    return Module(module.entry, {name: of(computation) for name, computation in module.computations.items()})


def _total_traffic(module: Module) -> int:
    found = (visit for visit in visits(module) if not visit.fused)
    return sum(visit.times * _traffic(module, visit.computation, visit.instruction) for visit in found)


def declared(instruction: Instruction, what: str) -> int:
    """What a kernel says of itself: "flops" or "bytes_accessed"; 0 where it says nothing."""
    found = re.search(rf'\\?"{what}\\?":\s*\\?"?(\d+)', instruction.text)
    return int(found.group(1)) if found else 0


def product_flops(computation: Computation, instruction: Instruction) -> int:
    """2 x multiply-adds of a `dot`, or of the `convolution` that a TPU makes of one."""
    left, right = (computation.instructions[name].shapes[0] for name in instruction.operands[:2])
    output = instruction.shapes[0]
    if instruction.opcode == "dot":
        contracted = _numbers(instruction.text, "lhs_contracting_dims")
        return 2 * output.size * math.prod(left.dims[dim] for dim in contracted)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    if labels is None:
        raise ValueError(f"convolution without dim_labels: {instruction.text[:120]}")
    of_left, of_right, of_output = labels.groups()
    total = output.dims[of_output.index("b")] * output.dims[of_output.index("f")] * right.dims[of_right.index("i")]
    window = dict(re.findall(r"(\w+)=([\w\-]+)", _braces(instruction.text, "window")))
    for axis in range(len(of_left) - 2):
        sizes = [shape.dims[label.index(str(axis))] for shape, label in ((left, of_left), (output, of_output))]
        total *= _window_positions(window, axis, *sizes)
    return 2 * total


def _window_positions(window: dict[str, str], axis: int, length: int, outputs: int) -> int:
    """Pairs of (output, kernel) positions of one spatial axis that meet a number: not padding, not dilation's holes."""

    def field(name: str, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    kernel, stride = int(field("size", "1")), int(field("stride", "1"))
    spread, reach = int(field("lhs_dilate", "1")), int(field("rhs_dilate", "1"))
    pad = int(field("pad", "0_0").split("_")[0])
    places = (output * stride + tap * reach - pad for output in range(outputs) for tap in range(kernel))
    return sum(0 <= place <= (length - 1) * spread and place % spread == 0 for place in places)


def _traffic(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes of HBM that an instruction outside fusions reads and writes."""
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith("-done"):
        return 0
    sources = [computation.instructions[name].shapes for name in instruction.operands]
    if opcode == "fusion":
        return _fusion_traffic(module.computations[called(instruction)[0]], module, sources)
    if opcode == "custom-call":
        if any(view in instruction.text for view in VIEWS):
            return 0
        kernel = declared(instruction, "bytes_accessed")
        return kernel or _in_hbm(instruction.shapes) + sum(map(_in_hbm, sources))
    if opcode == "copy-start":
        return _in_hbm(instruction.shapes[:2])
    if opcode == "slice-start":
        moved = instruction.shapes[1]
        return moved.nbytes * ((moved.memory_space == HBM) + (instruction.shapes[0].memory_space == HBM))
    if opcode in PARTIAL_READS:
        return _in_hbm(instruction.shapes) + (instruction.nbytes if _in_hbm(sources[0]) else 0)
    if opcode in IN_PLACE:
        return 2 * sources[IN_PLACE[opcode]][0].nbytes if _in_hbm(instruction.shapes) else 0
    return _in_hbm(instruction.shapes) + sum(map(_in_hbm, sources))


def _fusion_traffic(fused: Computation, module: Module, sources: list[tuple[Shape, ...]]) -> int:
    """What a fusion's results write, and what it reads of each operand: a slice where only slices are used."""
    written, root = 0, fused.root
    results = [fused.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for result in results:
        if result.opcode in ("parameter", *COLLECTIVES):
            continue
        if result.opcode in IN_PLACE:
            update = fused.instructions[result.operands[IN_PLACE[result.opcode]]]
            written += update.nbytes if _in_hbm(result.shapes) else 0
        elif not any(view in result.text for view in VIEWS):
            written += _in_hbm(result.shapes)
    parameters = {int(each.literal): each for each in fused.instructions.values() if each.opcode == "parameter"}
    read = sum(
        min(_in_hbm(source), _read(fused, module, parameters[index]))
        for index, source in enumerate(sources)
        if index in parameters and _in_hbm(source)
    )
    return written + read


def _read(fused: Computation, module: Module, parameter: Instruction) -> int:
    """How much of a fusion's operand is read."""
    total = 0
    for user in fused.instructions.values():
        places = [index for index, name in enumerate(user.operands) if name == parameter.name]
        if not places or user.opcode in PASSED_ON:
            continue
        if user.opcode in PARTIAL_READS and places == [0]:
            total += user.nbytes
        elif user.opcode in IN_PLACE and places == [0]:
            continue
        elif user.opcode == "fusion" and ALIASED in user.text:
            # Laid out anew in place: what is read of the result is what is read.
            total += _read(fused, module, user)
        elif user.opcode == "fusion":
            inner = module.computations[called(user)[0]]
            inside = {each.literal: each for each in inner.instructions.values() if each.opcode == "parameter"}
            total += sum(_read(inner, module, inside[str(place)]) for place in places)
        else:
            return parameter.nbytes
    return total


def _in_hbm(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.nbytes for shape in shapes if shape.memory_space == HBM)


def _numbers(text: str, name: str) -> list[int]:
    return [int(number) for number in _braces(text, name).split(",") if number]


def _braces(text: str, name: str) -> str:
    found = re.search(rf"\b{name}=\{{([^}}]*)\}}", text)
    return found.group(1) if found else ""
