"""The training step: written for one user, vmapped over the population.

No value crosses from one member to another: the base is unbatched and frozen, and each member has its own loss,
gradient, clipping, optimizer, step count and guard.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from popax.adapters.apply import bind
from popax.adapters.cohort import Cohort
from popax.adapters.masters import has_masters, seen
from popax.errors import ConfigError
from popax.objectives.base import BoundedSums, Objective, PolicySums, Sums
from popax.population.bounds import NormKind, check_kind, within_budget
from popax.population.guard import all_finite, keep_unless, none_broken
from popax.population.optimizer import Optimizer, Schedule, at_rates, clip_by_global_norm
from popax.population.state import PopulationState
from popax.types import AdapterState, Batch, Params, Rollouts


class StepMetrics(NamedTuple):
    """One member's step, or [N] of them. ran is False for an inactive member and for a step that was skipped."""

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    ran: jax.Array
    skipped: jax.Array
    sums: Sums | BoundedSums | PolicySums


MemberStep = Callable[[Params, AdapterState, PopulationState, Batch | Rollouts], tuple[PopulationState, StepMetrics]]


SiteWeight = Callable[[Params, str], jax.Array]


def member_step(
    cohort: Cohort,
    objective: Objective,
    optimizer: Optimizer,
    schedule: Schedule,
    *,
    weight: SiteWeight | None = None,
    budget: NormKind | None = None,
) -> MemberStep:
    """step(base, shared, member, batch) -> (member, metrics) for ONE user.

    weight: `Model.site_weight`, of which some methods derive a part of their state after each step. budget: which norm
    of the adapter stays within the user's `norm_budget` (None: no norm is looked at). Raises ConfigError where the
    method needs what it is not given, or has no such norm.

    The member's adapter is of float32 masters; the objective sees the values that will be stored of them. A loss,
    gradient or update that is not finite, also in the stored dtype alone, leaves adapter and optimizer as they were and
    is counted; an inactive member keeps every byte. The step count moves on skipped steps too, so that a poisonous
    batch is not met again.
    """

    if cohort.method.refresh is not None and weight is None:
        raise ConfigError(f"method={cohort.config.method!r} looks at the base's weights after a step: give weight=")
    if budget is not None:
        check_kind(cohort, budget)
    rates = cohort.rates()

    def step(
        base: Params, shared: AdapterState, member: PopulationState, batch: Batch | Rollouts
    ) -> tuple[PopulationState, StepMetrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(member.rng), member.step)

        def loss_of(adapter: AdapterState) -> tuple[jax.Array, Sums | BoundedSums | PolicySums]:
            loss, sums = objective(base, bind(cohort, seen(cohort, adapter), shared, dropout_key=key), batch)
            if isinstance(sums, BoundedSums):
                loss = loss + member.hparams.kl_weight * sums.kl / jnp.maximum(sums.targets, 1.0)
            return loss, sums

        (loss, sums), grads = jax.value_and_grad(loss_of, has_aux=True)(member.adapters)
        grads, grad_norm = clip_by_global_norm(grads, member.hparams.clip_norm)
        learning_rate = member.hparams.learning_rate * schedule(member.step, member.hparams.max_steps)
        # optax mixes integer counts with floats; whoever runs JAX with strict promotion keeps it everywhere else.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer(learning_rate).update(grads, member.opt_state, member.adapters)
            adapters: Any = optax.apply_updates(member.adapters, at_rates(updates, rates))
        if weight is not None:
            adapters = _refreshed(cohort, adapters, shared, functools.partial(weight, base))
        if budget is not None:
            adapters = within_budget(cohort, adapters, shared, member.hparams.norm_budget, budget)

        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & all_finite(seen(cohort, adapters))
        finite &= none_broken(opt_state, member.opt_state)
        ran, skipped = member.active & finite, member.active & ~finite
        adapters, opt_state = keep_unless(ran, (adapters, opt_state), (member.adapters, member.opt_state))
        count = member.step + member.active.astype(jnp.int32)
        return (
            member._replace(
                step=count,
                active=member.active & (count < member.hparams.max_steps),
                adapters=adapters,
                opt_state=opt_state,
                skipped=member.skipped + skipped.astype(jnp.int32),
            ),
            StepMetrics(loss, grad_norm, learning_rate, ran, skipped, sums),
        )

    return step


def _refreshed(
    cohort: Cohort, adapters: AdapterState, shared: AdapterState, weight: Callable[[str], jax.Array]
) -> AdapterState:
    """The masters after `Cohort.refreshed`, what is derived from others from the values that these are stored as."""
    fresh, derived = cohort.refreshed(adapters, shared, weight), cohort.method.derived
    if not (derived and has_masters(cohort)):
        return fresh
    own = cohort.refreshed(seen(cohort, fresh), shared, weight)
    return {site: leaves | {name: own[site][name] for name in derived} for site, leaves in fresh.items()}


def population_step(
    cohort: Cohort,
    objective: Objective,
    optimizer: Optimizer,
    schedule: Schedule,
    *,
    weight: SiteWeight | None = None,
    budget: NormKind | None = None,
    spmd_axis_name: str | tuple[str, ...] | None = None,
) -> MemberStep:
    """step(base, shared, state, batch) for N users at once: `jax.vmap` of `member_step`, state and batch with N first.

    spmd_axis_name: the mesh axes that shard the population, so that constraints inside the model keep them.
    """
    one = member_step(cohort, objective, optimizer, schedule, weight=weight, budget=budget)
    return jax.vmap(one, in_axes=(None, None, 0, 0), spmd_axis_name=spmd_axis_name)


def population_loss(
    cohort: Cohort, objective: Objective, *, spmd_axis_name: str | None = None
) -> Callable[[Params, AdapterState, AdapterState, Batch], Sums]:
    """sums(base, shared, adapters, batch) for N users at once, without dropout: of masters, as they will be stored."""

    def one(base: Params, shared: AdapterState, adapter: AdapterState, batch: Batch) -> Sums:
        return objective(base, bind(cohort, seen(cohort, adapter), shared), batch)[1]

    return jax.vmap(one, in_axes=(None, None, 0, 0), spmd_axis_name=spmd_axis_name)
