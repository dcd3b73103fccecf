"""Weight-only quantisation of a base matrix: one symmetric scale for each output column.

Relative to its column's largest entry, an int8 entry is off by at most 1/254. A float8_e4m3fn entry is off by at most
1/16 of itself, or, near zero, by 2^-10 / 448 of the column's largest.
"""

import jax
import jax.numpy as jnp

# The largest finite value of each stored dtype; int8's -128 stays unused, so that the range is symmetric.
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


def quantize(w_DxF: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """(q_DxF in dtype, scale_F in float32) with w ~ q * scale; a column of zeros has scale 1.

    dtype: "int8" (nearest, ties to even) or "float8_e4m3fn". Raises ValueError for any other.
    """
    if dtype not in LARGEST:
        raise ValueError(f"dtype {dtype!r}: weights are stored as {' or '.join(LARGEST)}")
    w32_DxF = w_DxF.astype(jnp.float32)
    largest_F = jnp.max(jnp.abs(w32_DxF), axis=0)
    scale_F = jnp.where(largest_F > 0, largest_F / LARGEST[dtype], 1.0)
    # Clipped: the rounded quotient may be a hair beyond the largest value, which float8_e4m3fn would make a NaN.
    scaled_DxF = jnp.clip(w32_DxF / scale_F[None, :], -LARGEST[dtype], LARGEST[dtype])
    rounded_DxF = jnp.round(scaled_DxF) if dtype == "int8" else scaled_DxF
    return rounded_DxF.astype(dtype), scale_F


def dequantize(q_DxF: jax.Array, scale_F: jax.Array) -> jax.Array:
    """q * scale, float32 [D, F]."""
    return q_DxF.astype(jnp.float32) * scale_F[None, :]
