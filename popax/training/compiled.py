"""The compiled programs of a population run. Shapes depend on the config alone: changing users never recompiles."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from popax.adapters.cohort import Cohort
from popax.modeling.model import Model
from popax.objectives.sft import sft
from popax.population.early_stop import observe
from popax.population.state import PopulationState, selected_adapters
from popax.population.step import population_loss, population_step
from popax.training.config import TrainConfig
from popax.trees import member, set_member


class Programs(NamedTuple):
    """step(base, shared, state, batch) and observe(state, sums) give the new state; loss(base, shared, adapters, batch)
    gives sums; seat(state, slot, member) gives the new state; take(state, slot) gives what the member keeps, and their
    counters. The state arguments of step, observe and seat are donated. observe is None without early stopping.
    """

    step: Callable[..., Any]
    loss: Callable[..., Any]
    observe: Callable[..., Any] | None
    seat: Callable[..., Any]
    take: Callable[..., Any]


def compile_programs(model: Model, cohort: Cohort, config: TrainConfig, **step_options: Any) -> Programs:
    """Jitted functions; nothing is compiled before its first call."""
    objective = sft(model, remat=config.remat)
    step = population_step(cohort, objective, config.optimizer, config.schedule, **step_options)
    return Programs(
        step=jax.jit(step, donate_argnums=2),
        loss=jax.jit(population_loss(cohort, objective, **step_options)),
        observe=jax.jit(functools.partial(observe, config.early_stop), donate_argnums=0) if config.early_stop else None,
        seat=jax.jit(set_member, donate_argnums=0),
        take=jax.jit(_take),
    )


def _take(state: PopulationState, slot: jax.Array) -> tuple[Any, Any]:
    one = member(state, slot)
    counters = {"steps": one.step, "skipped": one.skipped}
    if one.best is not None:
        counters |= {"kept_step": one.best.step, "validation_loss": one.best.loss}
    return selected_adapters(one), counters
