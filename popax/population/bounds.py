"""Bounded state: a step never leaves a user's change of the weights larger than that user's budget."""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from popax.adapters.cohort import Cohort
from popax.adapters.measures import spectral_norms
from popax.errors import ConfigError
from popax.types import AdapterState

NormKind = Literal["frobenius", "spectral"]


def check_bounds(norm_budget: float, kl_weight: float) -> None:
    """Raises ConfigError on a budget that is not above 0, and on a weight that is negative or not finite."""
    if not norm_budget > 0:
        raise ConfigError(f"norm_budget={norm_budget}: above 0 (inf is none); without any change there is no adapter")
    if not (math.isfinite(kl_weight) and kl_weight >= 0):
        raise ConfigError(f"kl_weight={kl_weight}: a finite number of at least 0")


def check_kind(cohort: Cohort, kind: NormKind) -> None:
    """Raises ConfigError where the method's state cannot be brought within such a norm."""
    if kind not in get_args(NormKind):
        raise ConfigError(f"norm budget {kind!r}: one of {', '.join(get_args(NormKind))}")
    if cohort.method.shrink is None:
        raise ConfigError(
            f"method={cohort.config.method!r} (init={cohort.config.init!r}) has no norm budget: its change of the "
            "weights does not shrink in proportion with its state"
        )
    if kind == "spectral" and not cohort.adds:
        raise ConfigError(f"method={cohort.config.method!r} has no spectral norm from factors: use the Frobenius norm")


def within_budget(
    cohort: Cohort, adapter: AdapterState, shared: AdapterState, budget: jax.Array, kind: NormKind
) -> AdapterState:
    """One user's adapter, shrunk to `budget` where its norm is larger, else its own bits.

    The norm: "frobenius", of all sites' changes together; "spectral", the largest singular value of any. It is that of
    the float32 masters: rounding to a narrower stored dtype is beside it.
    """
    norm = total_norm(cohort, adapter, shared, kind)
    factor = jnp.where(norm > budget, budget / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny), 1.0)
    assert cohort.method.shrink is not None
    shrunk = {site: cohort.method.shrink(leaves, factor) for site, leaves in adapter.items()}
    return jax.tree.map(lambda new, old: jnp.where(norm > budget, new.astype(old.dtype), old), shrunk, adapter)


def total_norm(cohort: Cohort, adapter: AdapterState, shared: AdapterState, kind: NormKind) -> jax.Array:
    """The norm that a budget is for, float32; 0 for an adapter that changes nothing."""
    if kind == "spectral":
        return jnp.max(jnp.stack([jnp.max(each) for each in spectral_norms(cohort, adapter, shared).values()]))
    return jnp.sqrt(sum(jnp.sum(norm**2) for norm in cohort.norms(adapter, shared).values()))
