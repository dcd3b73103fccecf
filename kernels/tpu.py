"""What all TPU kernels share: compiler parameters, block sizes that divide, products and what they take."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
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


def dot(left: jax.Array, right: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """The product over the `contract` axes of either side, in float32; exact products where left is float32."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        left, right, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def check_dtypes(*arrays: jax.Array | None) -> None:
    for array in arrays:
        if array is not None and array.dtype not in (jnp.bfloat16, jnp.float32):
            raise NotImplementedError(f"an operand is {array.dtype}; the TPU form takes bfloat16 and float32")


def phases(first_steps: int) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """step -> (block of the first phase, block of the second): each stands still while the other moves."""

    def column(step):
        return jnp.minimum(step, first_steps - 1), jnp.maximum(step - first_steps, 0)

    return column


def two_rows(array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Rank 1, along these axes, as rank 2 with zeros, because the compiler has no single-row operands.

    Other ranks as they are. Factors are small beside activations.
    """
    if array.shape[axes[0]] != 1:
        return array
    return jnp.pad(array, [(0, 1 if axis in axes else 0) for axis in range(array.ndim)])


def block_shapes(tokens: int, d_in: int, d_out: int) -> list[tuple[int, int, int]]:
    """(rows, columns of x, columns of y) of a step, worth trying: divisors, large enough for whole transfers."""
    tiles = [tile for tile in (128, 256, 512) if tokens % tile == 0] or [tokens]
    widths = (512, 1024, 2048)
    pairs = [(wide, out) for wide in widths for out in widths if d_in % wide == 0 and d_out % out == 0]
    return [(tile, *pair) for tile in tiles for pair in pairs]
