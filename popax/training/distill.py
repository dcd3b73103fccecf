"""Users' adapters refitted to a new base: each drawn to what the old base said with the adapter that the user had."""

import functools
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from popax.adapters.cohort import Cohort
from popax.modeling.base import Base
from popax.objectives.distill import DistillBatch, distill, pair
from popax.objectives.sft import sft
from popax.population.early_stop import observe
from popax.population.optimizer import check_factors
from popax.population.state import PopulationState, init_member, stored_adapters
from popax.population.step import population_loss, population_step
from popax.training.config import TrainConfig
from popax.training.fit import BatchesAhead, fit
from popax.training.members import user_key
from popax.training.stream import pad_rows
from popax.types import AdapterState, Batch


class Text(Protocol):
    """The data side (popax.data.pipeline.UserPipeline)."""

    def rows(self, user: str, split: str) -> Batch: ...
    def population(self, users: Sequence[str | None], steps: Sequence[int], accumulate: int = 1) -> Batch: ...
    def evaluation(self, users: Sequence[str | None], split: str, max_rows: int | None = None) -> Batch: ...


class Distiller:
    """One compiled step for groups of `group` users; the last group is filled up with users who are idle."""

    def __init__(
        self,
        old: Base,
        new: Base,
        cohorts: tuple[Cohort, Cohort],
        shared: tuple[AdapterState, AdapterState],
        data: Text,
        config: TrainConfig,
        *,
        group: int,
        batch_size: int,
    ):
        """cohorts, shared: of the old base, of the new one. config: as for training, but for its adapter and slots."""
        self._pair, self._student, self._shared = pair(new.params, old.params, shared[0]), new.params, shared[1]
        self._target, self._data, self._config = cohorts[1], data, config
        self._group, self._batch_size = group, batch_size
        check_factors(config.schedule, config.steps)
        objective = distill(new.model, old.model, cohorts[0], remat=config.remat)
        step = population_step(
            self._target,
            objective,
            config.optimizer,
            config.schedule,
            accumulate=config.accumulate,
            weight=lambda params, site: new.model.site_weight(params["student"], site),
            budget=config.budget,
        )
        self._step = jax.jit(step, donate_argnums=2)
        self._loss = jax.jit(population_loss(self._target, sft(new.model)))
        self._start = jax.jit(jax.vmap(self._member))
        self._keep = jax.jit(functools.partial(stored_adapters, self._target))
        rule = config.early_stop
        self._observe = None if rule is None else jax.jit(functools.partial(observe, rule))

    def refit(
        self, users: Sequence[str], taught_N: AdapterState, start_N: AdapterState
    ) -> tuple[AdapterState, np.ndarray]:
        """(adapters [N, L, ...] for the new base, the step each was kept at, int32 [N]: 0 where it is the start).

        taught_N: their adapters on the old base; start_N: where the new ones begin. With early stopping a user keeps
        the adapter that does best on their validation text, which may be the start; a user without text keeps it.
        """
        idle = [None] * (self._group - len(users))
        seats: list[str | None] = [*users, *idle]
        steps_N = np.array([self._steps(user) for user in seats], np.int32)
        readers = [user if steps else None for user, steps in zip(seats, steps_N, strict=True)]
        keys_N = jnp.stack([jax.random.key_data(user_key(self._config.seed, user or "")) for user in seats])
        taught_N, start_N = (_filled(tree, len(idle)) for tree in (taught_N, start_N))
        state = self._start(keys_N, jnp.asarray(steps_N), start_N)
        accumulate = self._config.accumulate
        taught_N = jax.tree.map(lambda leaf: _repeated(leaf, accumulate), taught_N)

        def make(step: int) -> DistillBatch:
            return DistillBatch(self._data.population(readers, [step] * self._group, accumulate), taught_N)

        with BatchesAhead(make) as batches:
            state = fit(
                state,
                steps=int(steps_N.max()),
                step=lambda state, batch: self._step(self._pair, self._shared, state, batch),
                batches=batches,
                observe=lambda state: self._look(state, seats),
                every=self._config.round_length,
                over=lambda state: not np.asarray(state.active).any(),
            )
        kept_N = state.step if state.best is None else state.best.step
        made = jax.tree.map(lambda leaf: np.asarray(leaf)[: len(users)], self._keep(state))
        return made, np.asarray(kept_N)[: len(users)]

    def _member(self, key: jax.Array, steps: jax.Array, adapter: AdapterState) -> PopulationState:
        config = self._config
        settings = config.member_settings(1)._replace(max_steps=steps)
        key, track = jax.random.wrap_key_data(key), config.early_stop is not None
        return init_member(self._target, config.optimizer, key, settings, adapter=adapter, track_best=track)

    def _steps(self, user: str | None) -> int:
        rows = 0 if user is None else len(self._data.rows(user, "past").tokens_BxT)
        return self._config.steps_for(rows, self._batch_size)

    def _look(self, state: PopulationState, seats: Sequence[str | None]) -> PopulationState:
        if self._observe is None:
            return state
        rows = self._config.validation_rows
        batch = self._data.evaluation(seats, "validation", max_rows=rows)
        batch = jax.tree.map(lambda leaf: pad_rows(leaf, rows), batch)
        return self._observe(state, self._loss(self._student, self._shared, state.adapters, batch))


def _repeated(leaf_N: np.ndarray, accumulate: int) -> np.ndarray:
    """The same for each micro-batch, where a step has several."""
    return leaf_N if accumulate == 1 else np.broadcast_to(leaf_N[:, None], (len(leaf_N), accumulate, *leaf_N.shape[1:]))


def _filled(tree_N: AdapterState, count: int) -> AdapterState:
    """With `count` members more, of zeros."""
    return jax.tree.map(lambda leaf: np.concatenate([leaf, np.zeros((count, *leaf.shape[1:]), leaf.dtype)]), tree_N)
