"""The training step: written for one user, vmapped over the population.

A step is `member_grads` of each of its micro-batches, added up, then `member_update`. No value crosses from one member
to another: the base is unbatched and frozen, and each member has its own loss, gradient, clipping, optimizer, step
count and guard.
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
from popax.objectives.base import Objective, mean_loss, merged, targets_of
from popax.population.bounds import NormKind, check_kind, within_budget
from popax.population.guard import all_finite, keep_unless, none_broken
from popax.population.optimizer import Optimizer, Schedule, at_rates, clip_by_global_norm
from popax.population.state import PopulationState
from popax.types import AdapterState, Params


class StepMetrics(NamedTuple):
    """One member's step, or [N] of them. ran is False for an inactive member and for a step that was skipped.

    loss: loss_sum / weights of the whole step, as `weights`, the sum of what the objective weighed; sums: its metrics.
    """

    loss: jax.Array
    weights: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    ran: jax.Array
    skipped: jax.Array
    sums: Any


class Accumulated(NamedTuple):
    """Of the micro-batches of a step so far: grads, d loss_sum / d adapters divided by the step's normaliser, and the
    sums that the objective gave."""

    grads: AdapterState
    loss_sum: jax.Array
    weight_sum: jax.Array
    metrics: Any

    def plus(self, other: "Accumulated") -> "Accumulated":
        """With another micro-batch of the same step."""
        return Accumulated(
            jax.tree.map(jnp.add, self.grads, other.grads),
            self.loss_sum + other.loss_sum,
            self.weight_sum + other.weight_sum,
            merged(self.metrics, other.metrics),
        )


# (base, shared, member, batch, normaliser, number of the micro-batch) -> Accumulated
MemberGrads = Callable[[Params, AdapterState, PopulationState, Any, jax.Array, jax.Array | int], Accumulated]
# (base, shared, member, accumulated, normaliser) -> (member, metrics)
MemberUpdate = Callable[
    [Params, AdapterState, PopulationState, Accumulated, jax.Array], tuple[PopulationState, StepMetrics]
]
# (base, shared, member, batch) -> (member, metrics)
MemberStep = Callable[[Params, AdapterState, PopulationState, Any], tuple[PopulationState, StepMetrics]]
SiteWeight = Callable[[Params, str], jax.Array]


def member_grads(cohort: Cohort, objective: Objective) -> MemberGrads:
    """grads(base, shared, member, batch, normaliser, index) -> Accumulated of ONE user's micro-batch.

    The gradient is of loss_sum / normaliser, a float32 scalar that all micro-batches of a step share: about the sum of
    the step's weights, so that numbers stay of the size they have in a step of one batch. index: of the micro-batch in
    the step, from which its dropout follows. The objective sees the values that will be stored of the float32 masters.
    """

    def grads(
        base: Params,
        shared: AdapterState,
        member: PopulationState,
        batch: Any,
        normaliser: jax.Array,
        index: jax.Array | int = 0,
    ) -> Accumulated:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(member.rng), member.step), index)

        def loss_of(adapter: AdapterState) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Any]]:
            adapt = bind(cohort, seen(cohort, adapter), shared, dropout_key=key)
            loss_sum, weight_sum, metrics, *_ = objective(base, adapt, batch, member.hparams)
            return loss_sum / normaliser, (loss_sum, weight_sum, metrics)

        (_, sums), own = jax.value_and_grad(loss_of, has_aux=True)(member.adapters)
        return Accumulated(own, *sums)

    return grads


def member_update(
    cohort: Cohort,
    optimizer: Optimizer,
    schedule: Schedule,
    *,
    weight: SiteWeight | None = None,
    budget: NormKind | None = None,
) -> MemberUpdate:
    """update(base, shared, member, accumulated, normaliser) -> (member, metrics): what a step's gradients do to a user.

    weight: `Model.site_weight`, of which some methods derive a part of their state after each step. budget: which norm
    of the adapter stays within the user's `norm_budget` (None: no norm is looked at). Raises ConfigError where the
    method needs what it is not given, or has no such norm.

    The gradient of the mean is that of the sum by what the objective weighed, whatever the normaliser was. A loss,
    gradient or update that is not finite, also in the stored dtype alone, leaves adapter and optimizer as they were and
    is counted; an inactive member keeps every byte. The step count moves on skipped steps too, so that a poisonous
    batch is not met again.
    """
    if cohort.method.refresh is not None and weight is None:
        raise ConfigError(f"method={cohort.config.method!r} looks at the base's weights after a step: give weight=")
    if budget is not None:
        check_kind(cohort, budget)
    rates = cohort.rates()

    def update(
        base: Params, shared: AdapterState, member: PopulationState, given: Accumulated, normaliser: jax.Array
    ) -> tuple[PopulationState, StepMetrics]:
        # Exactly 1 where the objective weighs what the batch does.
        share = mean_loss(normaliser, given.weight_sum)
        loss = mean_loss(given.loss_sum, given.weight_sum)
        grads = jax.tree.map(lambda grad: grad * share.astype(grad.dtype), given.grads)
        grads, grad_norm = clip_by_global_norm(grads, member.hparams.clip_norm)
        learning_rate = member.hparams.learning_rate * schedule(member.step, member.hparams.max_steps)
        own = member.hparams._replace(learning_rate=learning_rate)
        # optax mixes integer counts with floats; whoever runs JAX with strict promotion keeps it everywhere else.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer(own).update(grads, member.opt_state, member.adapters)
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
            StepMetrics(loss, given.weight_sum, grad_norm, learning_rate, ran, skipped, given.metrics),
        )

    return update


def member_step(
    cohort: Cohort,
    objective: Objective,
    optimizer: Optimizer,
    schedule: Schedule,
    *,
    accumulate: int = 1,
    weight: SiteWeight | None = None,
    budget: NormKind | None = None,
) -> MemberStep:
    """step(base, shared, member, batch) -> (member, metrics) for ONE user: gradients of all micro-batches, one update.

    accumulate: how many micro-batches a step has; above 1 every leaf of the batch has them first, [A, B, T], and only
    one of them is in memory at a time. The result is that of one batch with all their rows. Raises as `member_update`.
    """
    grads = member_grads(cohort, objective)
    update = member_update(cohort, optimizer, schedule, weight=weight, budget=budget)

    def step(
        base: Params, shared: AdapterState, member: PopulationState, batch: Any
    ) -> tuple[PopulationState, StepMetrics]:
        normaliser = targets_of(batch)
        if accumulate == 1:
            return update(base, shared, member, grads(base, shared, member, batch, normaliser, 0), normaliser)

        def more(so_far: Accumulated, part: tuple[jax.Array, Any]) -> tuple[Accumulated, None]:
            return so_far.plus(grads(base, shared, member, part[1], normaliser, part[0])), None

        first = grads(base, shared, member, jax.tree.map(lambda leaf: leaf[0], batch), normaliser, 0)
        rest = jax.tree.map(lambda leaf: leaf[1:], batch)
        given, _ = jax.lax.scan(more, first, (jnp.arange(1, accumulate), rest))
        return update(base, shared, member, given, normaliser)

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
    accumulate: int = 1,
    weight: SiteWeight | None = None,
    budget: NormKind | None = None,
    spmd_axis_name: str | tuple[str, ...] | None = None,
) -> MemberStep:
    """step(base, shared, state, batch) for N users at once: `jax.vmap` of `member_step`, state and batch with N first.

    spmd_axis_name: the mesh axes that shard the population, so that constraints inside the model keep them.
    """
    one = member_step(cohort, objective, optimizer, schedule, accumulate=accumulate, weight=weight, budget=budget)
    return jax.vmap(one, in_axes=(None, None, 0, 0), spmd_axis_name=spmd_axis_name)


def population_loss(
    cohort: Cohort, objective: Objective, *, spmd_axis_name: str | None = None
) -> Callable[[Params, AdapterState, AdapterState, Any], Any]:
    """metrics(base, shared, adapters, batch) for N users at once, without dropout: of masters, as they are stored."""

    def one(base: Params, shared: AdapterState, adapter: AdapterState, batch: Any) -> Any:
        return objective(base, bind(cohort, seen(cohort, adapter), shared), batch, None)[2]

    return jax.vmap(one, in_axes=(None, None, 0, 0), spmd_axis_name=spmd_axis_name)
