"""The text of a compiled program as data: computations, instructions, shapes, and how often each of them runs."""

import re
from collections.abc import Iterator
from typing import NamedTuple

ITEM_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "f4e2m1fn": 4, "s8": 8, "u8": 8, "f8e4m3": 8, "f8e4m3fn": 8,
    "f8e5m2": 8, "f8e4m3b11fnuz": 8, "f8e4m3fnuz": 8, "f8e5m2fnuz": 8, "f8e8m0fnu": 8, "s16": 16, "u16": 16,
    "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
HBM = 0
# Attributes that name computations which run inside the instruction.
_CALLED = re.compile(r"\b(?:calls|to_apply|body|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")


class Shape(NamedTuple):
    """One array of an instruction's result. memory_space: 0 is HBM; a TPU's own memories have other numbers."""

    dtype: str
    dims: tuple[int, ...]
    memory_space: int

    @property
    def size(self) -> int:
        total = 1
        for dim in self.dims:
            total *= dim
        return total

    @property
    def nbytes(self) -> int:
        return -(-self.size * ITEM_BITS.get(self.dtype, 0) // 8)


class Instruction(NamedTuple):
    """opcode(operands) of a computation; text is everything after the operands, literal what a constant holds."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    text: str
    is_root: bool

    @property
    def nbytes(self) -> int:
        return sum(shape.nbytes for shape in self.shapes)


class Computation(NamedTuple):
    """Instructions by name, in the program's order."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(instruction for instruction in self.instructions.values() if instruction.is_root)


class Module(NamedTuple):
    """A compiled program."""

    entry: str
    computations: dict[str, Computation]


class Visit(NamedTuple):
    """An instruction that runs `times` times in one run of the program; fused: inside a fusion's computation."""

    computation: Computation
    instruction: Instruction
    times: int
    fused: bool


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if line.endswith("{") and " -> " in line and not line.startswith((" ", "HloModule")):
                is_entry, _, rest = line.rpartition("ENTRY ")
                name = rest.split()[0].lstrip("%")
                current = computations[name] = Computation(name, {})
                entry = name if is_entry or line.startswith("ENTRY ") else entry
        elif line.startswith("}"):
            current = None
        elif " = " in line:
            instruction = _instruction(line)
            current.instructions[instruction.name] = instruction
    return Module(entry, computations)


def _instruction(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    is_root = left.startswith("ROOT ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    rest = right[end:].lstrip()
    opened = rest.index("(")
    closed = _closing(rest, opened)
    inside = rest[opened + 1 : closed]
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        opcode=rest[:opened],
        shapes=shapes(right[:end]),
        operands=tuple(_NAME.findall(inside)),
        literal=inside,
        text=rest[closed + 1 :],
        is_root=is_root,
    )


def _closing(text: str, opened: int) -> int:
    depth = 0
    for index in range(opened, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"no closing parenthesis: {text[:120]!r}")


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a shape as HLO writes it, tuples flattened."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        found.append(
            Shape(dtype, tuple(int(dim) for dim in dims.split(",") if dim), int(space.group(1)) if space else HBM)
        )
    return tuple(found)


def called(instruction: Instruction) -> list[str]:
    """The computations that run inside an instruction, a loop's condition apart."""
    return [name for group in _CALLED.findall(instruction.text) for name in re.findall(r"[\w.\-]+", group)]


def visits(module: Module) -> Iterator[Visit]:
    """Every instruction that runs, with how often. A loop whose trip count cannot be read counts once.

    Reductions' and sorts' scalar computations are left out: they are part of their instruction.
    """

    def walk(name: str, times: int, fused: bool) -> Iterator[Visit]:
        computation = module.computations[name]
        for instruction in computation.instructions.values():
            yield Visit(computation, instruction, times, fused)
            inner = times
            if instruction.opcode == "while":
                inner *= trip_count(module, computation, instruction) or 1
            elif instruction.opcode not in ("fusion", "call", "conditional", "async-start", "custom-call"):
                continue
            for callee in called(instruction):
                if callee in module.computations:
                    yield from walk(callee, inner, fused or instruction.opcode == "fusion")

    yield from walk(module.entry, 1, False)


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs, from the compiler's note or from a counter compared with a constant; None: unknown."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
    if noted:
        return int(noted.group(1))
    names = dict(re.findall(r"\b(condition|body)=%?([\w.\-]+)", loop.text))
    condition, body = module.computations[names["condition"]], module.computations[names["body"]]
    compare = condition.root
    if compare.opcode != "compare" or "direction=LT" not in compare.text:
        return None
    counter = condition.instructions[compare.operands[0]]
    limit = _constant(condition, compare.operands[1])
    index = re.search(r"\bindex=(\d+)", counter.text)
    if limit is None or index is None:
        return None
    position = int(index.group(1))
    step = _step(body, position)
    if step is None:
        return None
    start = _constant(computation, computation.instructions[loop.operands[0]].operands[position]) or 0
    return max(0, -(-(limit - start) // step))


def _step(body: Computation, position: int) -> int | None:
    """What the loop adds to element `position` of its state."""
    update = body.instructions[body.root.operands[position]]
    if update.opcode != "add":
        return None
    constants = [value for name in update.operands if (value := _constant(body, name)) is not None]
    return constants[0] if len(constants) == 1 else None


def _constant(computation: Computation, name: str) -> int | None:
    """The integer that an instruction holds, through copies."""
    instruction = computation.instructions[name]
    while instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
        instruction = computation.instructions[instruction.operands[0]]
    if instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", instruction.literal):
        return None
    return int(instruction.literal)
