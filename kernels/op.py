"""What an op tells the tests, the tuner and the benchmarks about itself: one row of pure functions for each pass."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax


class Cost(NamedTuple):
    """The least work that a call must do: multiply-adds count two, each operand is read once, each result written once.

    An adapter's rows count once for each distinct slot in use, and only up to its actual rank.
    """

    flops: int
    bytes: int


class Op(NamedTuple):
    """One pass of one op.

    specs: named shapes, NamedTuples whose first field is `name`.
    operands(spec, dtype): the call's operands as jax.ShapeDtypeStruct (None stays None).
    example(spec, dtype, seed): operands as numpy arrays, made on demand.
    implementations: "xla" (the oracle) and the kernels, all with the same operands and results.
    rivals: other XLA forms of the same result, for comparison only.
    cost(spec, dtype): the floor.
    block_types: the NamedTuple of block sizes of each kernel, which it takes as `blocks=`.
    blocks(spec, implementation): candidates for the tuner.
    donated: operands that a caller gives up, as a program does with an intermediate; a result may take their memory.
    """

    name: str
    specs: tuple[Any, ...]
    operands: Callable[..., tuple[Any, ...]]
    example: Callable[..., tuple[Any, ...]]
    implementations: Mapping[str, Callable[..., Any]]
    rivals: Mapping[str, Callable[..., Any]]
    cost: Callable[..., Cost]
    block_types: Mapping[str, Any] = MappingProxyType({})
    blocks: Callable[..., tuple[Any, ...]] = lambda spec, implementation: ()
    donated: tuple[int, ...] = ()


def nbytes(*operands: Any) -> int:
    """Logical bytes of arrays or ShapeDtypeStructs, trees of them included."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(operands))
