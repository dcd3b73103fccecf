"""The compiled programs of a population run. Shapes depend on the config alone: changing users never recompiles."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from popax.adapters.cohort import Cohort
from popax.memo import built_once
from popax.modeling.model import Model
from popax.modeling.remat import Remat
from popax.objectives.kl import sft_with_kl
from popax.objectives.sft import sft
from popax.population.bounds import NormKind
from popax.population.continuation import continuation
from popax.population.early_stop import EarlyStop, observe
from popax.population.optimizer import Optimizer, Schedule, check_factors
from popax.population.placement import AXIS, Placement
from popax.population.state import PopulationState, empty_population, stored_adapters
from popax.population.step import population_loss, population_step
from popax.sharding import ShardingRules, training_options
from popax.training.config import TrainConfig


class Programs(NamedTuple):
    """step(base, shared, state, batch) and observe(state, sums) give the new state; loss(base, shared, adapters, batch)
    gives sums; seat(state, slot, what Placement.seated gives) gives the new state; take(state, slot) gives what the
    member keeps, their counters, and what their training goes on with, for Placement.taken. The state arguments of
    step, observe and seat are donated. observe is None without early stopping.
    """

    step: Callable[..., Any]
    loss: Callable[..., Any]
    observe: Callable[..., Any] | None
    seat: Callable[..., Any]
    take: Callable[..., Any]


def compile_programs(model: Model, cohort: Cohort, config: TrainConfig, placement: Placement | None = None) -> Programs:
    """Jitted functions; nothing is compiled before its first call. placement: by default all on one device.

    Runs of one process that differ in numbers alone (rates, steps, users) are given the same ones. Raises ConfigError
    where the schedule has steps without a rate (`check_factors`).
    """
    check_factors(config.schedule, config.steps)
    where = placement or Placement(config.slots)
    return _programs(model, cohort, _Shaping.of(config), where.slots, where.mesh, where.rules)


class _Shaping(NamedTuple):
    """What of a TrainConfig the programs depend on."""

    optimizer: Optimizer
    schedule: Schedule
    early_stop: EarlyStop | None
    keep_optimizer: bool
    remat: Remat
    penalised: bool
    budget: NormKind | None

    @classmethod
    def of(cls, config: TrainConfig) -> "_Shaping":
        named = {name: getattr(config, name) for name in cls._fields if name != "penalised"}
        return cls(penalised=bool(config.kl_weight), **named)


@built_once
def _programs(
    model: Model, cohort: Cohort, config: _Shaping, slots: int, mesh: Mesh | None, rules: ShardingRules
) -> Programs:
    placement = Placement(slots, mesh, rules)
    objective = sft(model, remat=config.remat)
    over = AXIS if placement.blocks > 1 else None
    step = population_step(
        cohort,
        sft_with_kl(model, remat=config.remat) if config.penalised else objective,
        config.optimizer,
        config.schedule,
        weight=model.site_weight,
        budget=config.budget,
        spmd_axis_name=over,
    )
    loss = population_loss(cohort, objective, spmd_axis_name=over)
    look = functools.partial(observe, config.early_stop) if config.early_stop else None
    take = functools.partial(_take, cohort, placement, config.keep_optimizer)
    if placement.mesh is None:
        return Programs(
            step=jax.jit(step, donate_argnums=2),
            loss=jax.jit(loss),
            observe=jax.jit(look, donate_argnums=0) if look else None,
            seat=jax.jit(placement.seat, donate_argnums=0),
            take=jax.jit(take),
        )
    # Said for every result: the state must come back where it was, whatever the partitioner would choose.
    state = placement.shardings(cohort, jax.eval_shape(functools.partial(_empty, cohort, config, slots)))
    users, options = placement.over_population, training_options(placement.mesh)
    jitted = jax.jit(step, donate_argnums=2, out_shardings=(state, users), compiler_options=options)
    return Programs(
        step=_under(placement.mesh, jitted),
        loss=_under(placement.mesh, jax.jit(loss, out_shardings=users)),
        observe=jax.jit(look, donate_argnums=0, out_shardings=state) if look else None,
        seat=jax.jit(placement.seat, donate_argnums=0, out_shardings=state),
        take=jax.jit(take, out_shardings=users),
    )


def _under(mesh: Mesh, program: Callable[..., Any]) -> Callable[..., Any]:
    """The program with the mesh as the ambient one, by which kernels and experts choose their form."""

    def call(*arguments: Any) -> Any:
        with jax.set_mesh(mesh):
            return program(*arguments)

    return call


def abstract_population(cohort: Cohort, config: TrainConfig) -> PopulationState:
    """The shapes and dtypes of the run's state."""
    return jax.eval_shape(functools.partial(empty_slots, cohort, config))


def empty_slots(cohort: Cohort, config: TrainConfig) -> PopulationState:
    """The run's state before anyone is seated."""
    return _empty(cohort, config, config.slots)


def _empty(cohort: Cohort, config: TrainConfig | _Shaping, slots: int) -> PopulationState:
    tracked = {"track_best": config.early_stop is not None, "keep_optimizer": config.keep_optimizer}
    return empty_population(cohort, config.optimizer, slots, **tracked)


def _take(
    cohort: Cohort, placement: Placement, keep_optimizer: bool, state: PopulationState, slot: jax.Array
) -> tuple[Any, Any, Any]:
    one = placement.take(state, slot)
    counters = {"steps": one.step, "skipped": one.skipped}
    if one.best is not None:
        counters |= {"kept_step": one.best.step, "validation_loss": one.best.loss}
    return stored_adapters(cohort, one), counters, continuation(cohort, one) if keep_optimizer else None
