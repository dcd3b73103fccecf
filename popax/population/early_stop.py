"""Early stopping of ONE user by their own validation slice; vmapped over the population."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from popax.errors import ConfigError, PopulationError
from popax.objectives.base import LossSums
from popax.population.state import Best, PopulationState


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """Validate every `every` steps; stop after `patience` validations without a gain of `min_delta` nats a target."""

    every: int = 10
    patience: int = 3
    min_delta: float = 0.0

    def __post_init__(self):
        if self.every < 1 or self.patience < 1:
            raise ConfigError(f"every={self.every}, patience={self.patience}: both are at least 1")


def observe(rule: EarlyStop, state: PopulationState, validation: LossSums) -> PopulationState:
    """Take a validation into account, for N users at once.

    A user whose loss improves keeps this adapter as the best; one that has not improved for `patience` validations
    becomes inactive. A user without validation targets always keeps the latest adapter and never stops early.
    """
    if state.best is None:
        raise PopulationError("this population tracks no best adapter: make it with track_best=True")
    return jax.vmap(lambda member, sums: _observe_one(rule, member, sums))(state, validation)


def _observe_one(rule: EarlyStop, member: PopulationState, validation: LossSums) -> PopulationState:
    best = member.best
    assert best is not None
    unknown = validation.targets == 0
    loss = validation.nll / jnp.maximum(validation.targets, 1.0)
    better = unknown | (loss < best.loss - rule.min_delta)
    # Each step of a member counts once: a finished member, or an unused slot, meets later validations unchanged.
    take = member.step > best.checked
    improved = take & better
    stale = jnp.where(improved, 0, best.stale + take.astype(jnp.int32))

    def kept(now: Any, before: Any) -> Any:
        return jax.tree.map(lambda new, old: jnp.where(improved, new, old), now, before)

    return member._replace(
        active=member.active & (unknown | (stale < rule.patience)),
        best=Best(
            adapter=kept(member.adapters, best.adapter),
            loss=jnp.where(improved & ~unknown, loss, best.loss),
            step=jnp.where(improved, member.step, best.step),
            checked=jnp.maximum(member.step, best.checked),
            stale=stale,
            opt_state=None if best.opt_state is None else kept(member.opt_state, best.opt_state),
        ),
    )
