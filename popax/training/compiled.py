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
from popax.objectives.sft import sft
from popax.objectives.table import ObjectiveMaker, make_objective
from popax.population.bounds import NormKind
from popax.population.early_stop import EarlyStop, observe
from popax.population.optimizer import Optimizer, Schedule, check_factors
from popax.population.placement import AXIS, Placement
from popax.population.resume import resume_state
from popax.population.state import PopulationState, empty_population, stored_adapters
from popax.population.step import population_loss, population_step
from popax.sharding import ShardingRules, training_options
from popax.training.config import TrainConfig
from popax.types import AdapterState, Batch, Params


class Programs(NamedTuple):
    """step(base, shared, state, batch) and observe(state, sums) give the new state; loss(base, shared, adapters, batch)
    gives sums; insert_member(state, slot, what Placement.insertable gives) gives the new state; gather_member(state,
    slot) gives what the member keeps, their counters, and what their training goes on with, for Placement.gathered. The
    state arguments of step, observe and insert_member are donated. observe is None without early stopping.
    """

    step: Callable[..., Any]
    loss: Callable[..., Any]
    observe: Callable[..., Any] | None
    insert_member: Callable[..., Any]
    gather_member: Callable[..., Any]

    def validated(self, base: Params, shared: AdapterState, state: PopulationState, batch: Batch) -> PopulationState:
        """The state after a validation on these rows [N, M, T]; as it is without early stopping."""
        if self.observe is None:
            return state
        return self.observe(state, self.loss(base, shared, state.adapters, batch))


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

    objective: str | ObjectiveMaker
    accumulate: int
    optimizer: Optimizer
    schedule: Schedule
    early_stop: EarlyStop | None
    save_optimizer_state: bool
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
    over = AXIS if placement.blocks > 1 else None
    step = population_step(
        cohort,
        make_objective(config.objective, model, remat=config.remat, penalised=config.penalised),
        config.optimizer,
        config.schedule,
        accumulate=config.accumulate,
        weight=model.site_weight,
        budget=config.budget,
        spmd_axis_name=over,
    )
    # Whatever is minimised: users stop early, and are scored, by what their text costs.
    loss = population_loss(cohort, sft(model, remat=config.remat), spmd_axis_name=over)
    look = functools.partial(observe, config.early_stop) if config.early_stop else None
    take = functools.partial(_take, cohort, placement, config.save_optimizer_state)
    if placement.mesh is None:
        return Programs(
            step=jax.jit(step, donate_argnums=2),
            loss=jax.jit(loss),
            observe=jax.jit(look, donate_argnums=0) if look else None,
            insert_member=jax.jit(placement.insert_member, donate_argnums=0),
            gather_member=jax.jit(take),
        )
    # Said for every result: the state must come back where it was, whatever the partitioner would choose.
    state = placement.shardings(cohort, jax.eval_shape(functools.partial(_empty, cohort, config, slots)))
    users, options = placement.over_population, training_options(placement.mesh)
    jitted = jax.jit(step, donate_argnums=2, out_shardings=(state, users), compiler_options=options)
    return Programs(
        step=_under(placement.mesh, jitted),
        loss=_under(placement.mesh, jax.jit(loss, out_shardings=users)),
        observe=jax.jit(look, donate_argnums=0, out_shardings=state) if look else None,
        insert_member=jax.jit(placement.insert_member, donate_argnums=0, out_shardings=state),
        gather_member=jax.jit(take, out_shardings=users),
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
    tracked = {"track_best": config.early_stop is not None, "save_optimizer_state": config.save_optimizer_state}
    return empty_population(cohort, config.optimizer, slots, **tracked)


def _take(
    cohort: Cohort, placement: Placement, save_optimizer_state: bool, state: PopulationState, slot: jax.Array
) -> tuple[Any, Any, Any]:
    one = placement.gather_member(state, slot)
    counters = {"steps": one.step, "skipped": one.skipped}
    if one.best is not None:
        counters |= {"kept_step": one.best.step, "validation_loss": one.best.loss}
    return stored_adapters(cohort, one), counters, resume_state(cohort, one) if save_optimizer_state else None
