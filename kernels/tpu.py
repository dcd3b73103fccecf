"""What all TPU kernels share: compiler parameters, and block sizes that divide."""

from collections.abc import Sequence
from typing import Literal

from jax.experimental.pallas import tpu as pltpu

from popax.kernels import target

LANES = 128
SUBLANES = 8
# What blocks may take of a core's vector memory; the rest is for the compiler's own temporaries.
SMALL_BUDGET, LARGE_BUDGET = 12 << 20, 40 << 20
LARGE_VMEM = 64 << 20


def vmem_budget() -> int:
    """Bytes for a kernel's blocks and scratch on the device that is traced for."""
    return LARGE_BUDGET if target.vmem_bytes() >= LARGE_VMEM else SMALL_BUDGET


def compiler_params(semantics: Sequence[Literal["parallel", "arbitrary"]]):
    """semantics: "parallel" or "arbitrary" for each grid axis. The compiler may use a quarter more than the budget."""
    limit = vmem_budget() * 5 // 4
    return pltpu.CompilerParams(dimension_semantics=tuple(semantics), vmem_limit_bytes=limit)


def divisor_block(size: int, most: int, multiple: int = LANES) -> int:
    """The largest multiple of `multiple` that divides size and is <= most; size itself where there is none."""
    for block in range(min(most, size) // multiple * multiple, 0, -multiple):
        if size % block == 0:
            return block
    return size


def cdiv(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
