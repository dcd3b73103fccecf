"""Learned mixing: how much of each of several expert adapters suits a user, a coefficient a layer and expert.

The experts' factors lie side by side, as in a sum; a mix scales each expert's columns at each layer, so that it is
exactly sum_k c_lk (delta of expert k at layer l). Candidates are members of a population: one step tries all of them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from popax.adapters.apply import bind
from popax.adapters.base import AdapterConfig, SiteSpec
from popax.adapters.changes import as_leaves, layers_of, total
from popax.adapters.cohort import Cohort
from popax.adapters.compose import Part
from popax.errors import ComposeError
from popax.objectives.base import Objective, mean_of
from popax.types import AdapterState, Batch, Params


class AdapterBasis(NamedTuple):
    """Adapters beside each other, as one LoRA. expert_R: {site: whose each column is}. rows: {site: the row of the
    coefficients at each of its layers}; depth: how many rows there are, one a layer of the model and one for what is
    outside of them, if anything is adapted there.
    """

    cohort: Cohort
    adapter: AdapterState
    expert_R: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]
    count: int
    depth: int


def side_by_side(parts: Sequence[Part]) -> AdapterBasis:
    """The experts of a mix, of one base and any methods whose deltas add; their weights are left out of it.

    Raises ComposeError without experts, and where one acts on routed experts.
    """
    if not parts:
        raise ComposeError("there is no expert to mix")
    if any(spec.info.experts for part in parts for spec in part.cohort.sites):
        raise ComposeError("adapters at routed experts cannot be mixed")
    changes = [layers_of(part.cohort, part.adapter, part.shared) for part in parts]
    infos = {spec.info.name: spec.info for part in parts for spec in part.cohort.sites}
    layers = max((info.first_layer + info.layers for info in infos.values() if info.layers), default=0)
    specs, adapter, expert_R, rows = [], {}, {}, {}
    for name, info in infos.items():
        own = [(index, each[name]) for index, each in enumerate(changes) if name in each]
        both = total([change for _, change in own], [1.0] * len(own))
        expert_R[name] = np.concatenate([np.full(change.a_RxD.shape[-2], index) for index, change in own])
        count = max(info.layers, 1)
        specs.append(SiteSpec(info=info, ranks=(both.a_RxD.shape[-2],) * count, scales=(1.0,) * count))
        adapter[name] = as_leaves(both, bool(info.layers))
        rows[name] = info.first_layer + np.arange(count) if info.layers else np.array([layers])
    depth = layers + any(not info.layers for info in infos.values())
    rank = max(spec.rank for spec in specs)
    cohort = Cohort(AdapterConfig(rank=rank, alpha=1.0, alpha_rule="constant"), tuple(specs))
    return AdapterBasis(cohort, adapter, expert_R, rows, len(parts), depth)


def mixed(basis: AdapterBasis, mix_MxK: jax.Array) -> AdapterState:
    """The adapter of these coefficients, [depth, experts]."""

    def at(name: str) -> dict[str, jax.Array]:
        a, b = basis.adapter[name]["a"], basis.adapter[name]["b"]
        share_LxR = mix_MxK[basis.rows[name]][:, basis.expert_R[name]]
        share = share_LxR if b.ndim == 3 else share_LxR[0]
        return {"a": a, "b": b * share[..., None].astype(b.dtype)}

    return {name: at(name) for name in basis.adapter}


def mixed_loss(
    basis: AdapterBasis, objective: Objective[Batch]
) -> Callable[[Params, jax.Array, Batch], tuple[jax.Array, Any]]:
    """(loss, metrics) of (base, mix [M, K], batch): the objective with the experts so mixed."""

    mean = mean_of(objective)

    def loss(base: Params, mix_MxK: jax.Array, batch: Batch) -> tuple[jax.Array, Any]:
        return mean(base, bind(basis.cohort, mixed(basis, mix_MxK), {}), batch)

    return loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class CEMConfig:
    """The cross-entropy method of Transformer^2 (arXiv 2501.06252): candidates ~ N(mean, std^2) in [0, 1], of whom the
    elite, those with the lowest loss, give the next mean and std. smallest_std keeps a search from ending early."""

    population: int = 32
    elite: float = 0.2
    generations: int = 20
    mean: float = 0.5
    std: float = 0.3
    smallest_std: float = 0.01

    def __post_init__(self):
        if self.population < 2 or self.generations < 1 or not 0 < self.elite <= 1:
            raise ComposeError(f"{self}: at least 2 candidates and 1 generation, elite a share above 0")
        if self.std <= 0 or self.smallest_std < 0:
            raise ComposeError(f"{self}: std is above 0, smallest_std not below")

    @property
    def elites(self) -> int:
        return max(1, round(self.elite * self.population))


class Search(NamedTuple):
    """Where a search is: the distribution [M, K], and the best candidate so far with its loss in nats a target."""

    key: jax.Array
    mean_MxK: jax.Array
    std_MxK: jax.Array
    best_MxK: jax.Array
    best_loss: jax.Array


def start(basis: AdapterBasis, config: CEMConfig, key: jax.Array) -> Search:
    """Nothing is known yet."""
    shape = (basis.depth, basis.count)
    mean, std = (jnp.full(shape, value, jnp.float32) for value in (config.mean, config.std))
    return Search(key, mean, std, mean, jnp.asarray(jnp.inf, jnp.float32))


def generation(
    basis: AdapterBasis, objective: Objective[Batch], config: CEMConfig
) -> Callable[[Params, Search, Batch], tuple[Search, jax.Array]]:
    """step(base, search, batch) -> (search, the candidates' losses [N]): one population step for ONE user's batch.

    The mean itself is a candidate. A candidate whose loss is not finite is never of the elite.
    """

    loss = mixed_loss(basis, objective)

    def step(base: Params, search: Search, batch: Batch) -> tuple[Search, jax.Array]:
        key, own = jax.random.split(search.key)
        noise = jax.random.normal(own, (config.population - 1, *search.mean_MxK.shape))
        drawn = jnp.clip(search.mean_MxK[None] + noise * search.std_MxK[None], 0.0, 1.0)
        drawn_NxMxK = jnp.concatenate((search.mean_MxK[None], drawn))
        loss_N = jax.vmap(lambda mix: loss(base, mix, batch)[0])(drawn_NxMxK)
        order_N = jnp.argsort(jnp.where(jnp.isfinite(loss_N), loss_N, jnp.inf))
        elite = drawn_NxMxK[order_N[: config.elites]]
        better = loss_N[order_N[0]] < search.best_loss
        return (
            Search(
                key=key,
                mean_MxK=jnp.mean(elite, axis=0),
                std_MxK=jnp.maximum(jnp.std(elite, axis=0), config.smallest_std),
                best_MxK=jnp.where(better, drawn_NxMxK[order_N[0]], search.best_MxK),
                best_loss=jnp.where(better, loss_N[order_N[0]], search.best_loss),
            ),
            loss_N,
        )

    return step


def gradient_step(
    basis: AdapterBasis, objective: Objective[Batch], optimizer: optax.GradientTransformation
) -> Callable[[Params, jax.Array, Any, Batch], tuple[jax.Array, Any, jax.Array]]:
    """step(base, mix [M, K], opt_state, batch) -> (mix, opt_state, loss): coefficients learnt by descent.

    With the cross-entropy on a user's text it is LoRA soups' CAT (arXiv 2410.13025); with the entropy of predictions
    (popax.objectives.entropy), which needs no targets, AdaMerging (arXiv 2310.02575). No coefficient is bounded.
    """

    loss_of = mixed_loss(basis, objective)

    def step(base: Params, mix_MxK: jax.Array, state: Any, batch: Batch) -> tuple[jax.Array, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(lambda mix: loss_of(base, mix, batch)[0])(mix_MxK)
        with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic
            updates, state = optimizer.update(gradient, state, mix_MxK)
        return cast(jax.Array, optax.apply_updates(mix_MxK, updates)), state, loss

    return step
