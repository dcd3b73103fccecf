"""What all TPU kernels share: compiler parameters, and block sizes that divide."""

from collections.abc import Sequence

from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8
# Every kernel's own choice of blocks fits the smallest core (v4) with room for the compiler's spills.
VMEM_BUDGET = 12 << 20


def compiler_params(semantics: Sequence[str], *, vmem_limit: int | None = None):
    """semantics: "parallel" or "arbitrary" for each grid axis. vmem_limit: bytes, None for the compiler's own."""
    return pltpu.CompilerParams(dimension_semantics=tuple(semantics), vmem_limit_bytes=vmem_limit)


def divisor_block(size: int, most: int, multiple: int = LANES) -> int:
    """The largest multiple of `multiple` that divides size and is <= most; size itself where there is none."""
    for block in range(min(most, size) // multiple * multiple, 0, -multiple):
        if size % block == 0:
            return block
    return size


def cdiv(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
