"""Several adapters of one base made one adapter: sums, their best approximations, merges, and mixed coefficients."""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from popax.adapters import merging
from popax.adapters.base import AdapterConfig, TargetRule
from popax.adapters.changes import Changes, Factored, as_leaves, layers_of, total, truncated
from popax.adapters.cohort import Cohort
from popax.adapters.core_space import back, core_space
from popax.errors import ComposeError, ConfigError
from popax.types import AdapterState, SiteInfo

How = Literal["cat", "ties", "dare", "knots", "linear"]


class Part(NamedTuple):
    """One of the adapters, and its weight; shared: what its cohort's users share."""

    cohort: Cohort
    adapter: AdapterState
    shared: AdapterState
    weight: float = 1.0


class Composed(NamedTuple):
    """The new adapter. error: ||what its rank left out|| / ||the composition|| at each site's worst layer."""

    cohort: Cohort
    adapter: AdapterState
    error: dict[str, float]


def compose(
    parts: Sequence[Part], how: How = "cat", *, rank: int | None = None, density: float = 0.5, seed: int = 0
) -> Composed:
    """One adapter of all parts, which are of one base and may be of several methods, ranks and targets.

    "cat": the exact weighted sum. "ties", "dare": merged in core space; "knots": in its own (popax.adapters.merging).
    All of these give a LoRA whose factors hold the scale (alpha_rule "constant", alpha 1). rank: at most this one, by
    the best approximation, whose error is reported; without it whatever the composition needs. "linear": the weighted
    sum of what users of one cohort own, for methods whose delta is linear in it; the cohort stays.

    density: as in `merging.ties` and `dare`. Raises ComposeError where the parts cannot be combined so.
    """
    _check(parts, how, density)
    if how == "linear":
        return _mixed(parts)
    infos: dict[str, SiteInfo] = {}
    for part in parts:
        infos |= {spec.info.name: spec.info for spec in part.cohort.sites}
    _check_rank(rank, infos)
    of_parts = [_changes(part) for part in parts]
    made, error = {}, {}
    for index, (name, info) in enumerate(infos.items()):
        present = [
            (changes[name], part.weight) for changes, part in zip(of_parts, parts, strict=True) if name in changes
        ]
        combine = functools.partial(_combined, how, [weight for _, weight in present], density)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), index), max(info.layers, 1))
        change = jax.vmap(combine)(keys, tuple(each for each, _ in present))
        made[name], error[name] = _fitted(change, min(rank or math.inf, info.d_in, info.d_out))
    return _as_lora(made, infos, error)


def _combined(
    how: How, weights: Sequence[float], density: float, key: jax.Array, changes: Sequence[Factored]
) -> Factored:
    """Of one layer."""
    if how == "cat":
        return total(changes, weights)
    weight_N = jnp.asarray(weights, jnp.float32)
    if how == "knots":
        return merging.knots(changes, weight_N, density)
    space, core_NxJxK = core_space(changes)
    flat_NxP = core_NxJxK.reshape(len(changes), -1)
    if how == "ties":
        merged_P = merging.ties(flat_NxP, weight_N, density)
    else:
        merged_P = merging.dare(key, flat_NxP, weight_N, density)
    return back(space, merged_P.reshape(core_NxJxK.shape[1:]))


def _fitted(change: Factored, rank: float) -> tuple[Factored, float]:
    """All layers within the rank; exactly as they are where they are already."""
    if change.a_RxD.shape[-2] <= rank:
        return change, 0.0
    fitted = jax.vmap(lambda layer: truncated(layer, int(rank)))(change)
    return fitted.change, float(jnp.max(fitted.error))


def _as_lora(changes: Changes, infos: Mapping[str, SiteInfo], error: dict[str, float]) -> Composed:
    ranks = {name: change.a_RxD.shape[-2] for name, change in changes.items()}
    targets = tuple(TargetRule(pattern=re.escape(name), rank=rank) for name, rank in ranks.items())
    config = AdapterConfig(rank=max(ranks.values()), alpha=1.0, alpha_rule="constant", targets=targets)
    cohort = Cohort.of(config, infos)
    return Composed(cohort, {name: as_leaves(changes[name], cohort.layered[name]) for name in cohort.specs}, error)


def _mixed(parts: Sequence[Part]) -> Composed:
    cohort = parts[0].cohort
    if any(part.cohort != cohort for part in parts):
        raise ComposeError("linear: the adapters are of different configs, and what they own does not add; use cat")
    if not cohort.method.linear:
        raise ComposeError(
            f"linear: the delta of method={cohort.config.method!r} is not linear in what a user owns, so that a mix of "
            "states is no mix of deltas; use cat, which adds the deltas"
        )
    weighted = [jax.tree.map(lambda leaf, weight=part.weight: leaf * weight, part.adapter) for part in parts]
    return Composed(cohort, jax.tree.map(lambda *leaves: functools.reduce(jnp.add, leaves), *weighted), {})


def _changes(part: Part) -> Changes:
    experts = [spec.info.name for spec in part.cohort.sites if spec.info.experts]
    if experts:
        raise ComposeError(f"{', '.join(experts)}: adapters at routed experts cannot be composed")
    try:
        return layers_of(part.cohort, part.adapter, part.shared)
    except ConfigError as error:
        raise ComposeError(f"{error}: it can be served alone, but not be added to others") from error


def _check(parts: Sequence[Part], how: str, density: float) -> None:
    if how not in get_args(How):
        raise ComposeError(f"how={how!r}: one of {', '.join(get_args(How))}")
    if not parts:
        raise ComposeError("there is no adapter to compose")
    for part in parts:
        if not math.isfinite(part.weight):
            raise ComposeError(f"weight={part.weight}: a finite number")
    if not 0 < density <= 1:
        raise ComposeError(f"density={density}: a share above 0, at most 1")
    shapes: dict[str, SiteInfo] = {}
    for part in parts:
        for spec in part.cohort.sites:
            if shapes.setdefault(spec.info.name, spec.info) != spec.info:
                raise ComposeError(f"{spec.info.name} is {shapes[spec.info.name]} for one and {spec.info} for another")


def _check_rank(rank: int | None, infos: Mapping[str, SiteInfo]) -> None:
    narrow = min(min(info.d_in, info.d_out) for info in infos.values())
    if rank is not None and not 1 <= rank <= narrow:
        raise ComposeError(f"rank={rank}: at least 1, and at most {narrow}, which is the narrowest site's")
