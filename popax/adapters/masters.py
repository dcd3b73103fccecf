"""Adapters in training: float32 masters, of which the model sees what the stored dtype keeps.

A master collects steps that are far below the spacing of the stored numbers; gradients reach it in float32, so that
they do not vanish in float16. What a user keeps, and what is checkpointed, checked and served, is `stored`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from popax.adapters.cohort import Cohort
from popax.types import AdapterState

MASTER = "float32"
_SMALLEST_NORMAL, _SPACING = 2.0**-14, 2.0**-24  # float16's, of the numbers below the first


def masters(adapter: AdapterState) -> AdapterState:
    """float32 leaves of the same values."""
    return jax.tree.map(lambda leaf: leaf.astype(MASTER), adapter)


def has_masters(cohort: Cohort) -> bool:
    """Whether a user's state in training is more than what is stored of it."""
    return cohort.config.dtype != MASTER


def seen(cohort: Cohort, adapter: AdapterState) -> AdapterState:
    """The values that will be stored, in float32, with the gradient of the identity. Of a float32 cohort, and of what
    is in the stored dtype already, the adapter itself."""
    return _of_masters(cohort, adapter, lambda leaf: rounded(leaf, cohort.config.dtype))


def stored(cohort: Cohort, adapter: AdapterState) -> AdapterState:
    """What `seen` gives, in the cohort's dtype."""
    return _of_masters(cohort, adapter, lambda leaf: rounded(leaf, cohort.config.dtype).astype(cohort.config.dtype))


def _of_masters(cohort: Cohort, adapter: AdapterState, change: Any) -> AdapterState:
    if not has_masters(cohort):
        return adapter
    return jax.tree.map(lambda leaf: change(leaf) if leaf.dtype.name == MASTER else leaf, adapter)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def rounded(x: jax.Array, dtype: str) -> jax.Array:
    """float32 values to the nearest that the dtype has, inf beyond its largest; gradients pass as if it were not there.

    Not by two conversions: XLA takes the liberty to leave both out.
    """
    bits = jnp.finfo(dtype)
    near = jax.lax.reduce_precision(x, exponent_bits=bits.nexp, mantissa_bits=bits.nmant)
    if dtype != "float16":  # bfloat16 has float32's exponents
        return near
    # reduce_precision makes zeros of the numbers below the smallest normal one.
    steps = jax.lax.round(x * (1 / _SPACING), jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    return jnp.where(jnp.abs(x) < _SMALLEST_NORMAL, steps * _SPACING, near)


@rounded.defjvp
def _straight_through(dtype: str, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return rounded(primals[0], dtype), tangents[0]
