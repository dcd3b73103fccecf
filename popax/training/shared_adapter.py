"""The control of every personalisation figure: ONE adapter of the same size, trained on everybody's text."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from popax.adapters.cohort import Cohort
from popax.data.pipeline import UserPipeline
from popax.modeling.base import Base
from popax.population.state import init_population, stored_adapters
from popax.training.compiled import compile_programs
from popax.training.config import TrainConfig
from popax.training.fit import BatchesAhead, fit
from popax.types import AdapterState, Batch

VALIDATION_USERS = 32


def train_shared_adapter(
    base: Base,
    pipeline: UserPipeline,
    config: TrainConfig,
    users: Sequence[str],
    shared: AdapterState,
    *,
    on_step: Callable[[int, int], None] = lambda step, total: None,
) -> AdapterState:
    """The adapter after as many tokens as all these users' own adapters were given together; leaves are [1, L, ...].

    Each step takes as many rows as a population step, fair over users, and there are as many steps as the population
    needs: users / slots rounds of config.steps. Early stopping as for a user, on some users' validation slices.
    """
    slots = min(config.slots, len(users))
    total = -(-len(users) // slots) * config.steps
    wide = dataclasses.replace(pipeline.config, batch_size=pipeline.config.batch_size * slots)
    mixed = UserPipeline(pipeline.dataset, pipeline.tokenizer, wide).mixed(users)
    cohort = Cohort.of(config.adapter, base.model.sites())
    programs = compile_programs(base.model, cohort, config)
    settings = config.member_settings(total)
    keys = jax.random.split(jax.random.key(config.seed), 1)
    track_best = config.early_stop is not None
    state = init_population(cohort, config.optimizer, keys, settings, track_best=track_best)
    validation = _everyone(pipeline.evaluation(list(users[:VALIDATION_USERS]), "validation", max_rows=2))

    def make(step: int) -> Batch:
        if config.accumulate == 1:
            return jax.tree.map(lambda leaf: leaf[None], mixed.batch(step))
        parts = [mixed.batch(step * config.accumulate + part) for part in range(config.accumulate)]
        return jax.tree.map(lambda *leaves: np.stack(leaves)[None], *parts)

    with BatchesAhead(make) as batches:
        state = fit(
            state,
            steps=total,
            step=lambda state, batch: programs.step(base.params, shared, state, batch),
            batches=batches,
            observe=lambda state: programs.validated(base.params, shared, state, validation),
            every=config.round_length,
            over=lambda state: not bool(state.active[0]),
            on_step=lambda done, state, metrics: on_step(done, total),
        )
    return stored_adapters(cohort, state)


def _everyone(batch_NxMxT: Batch) -> Batch:
    """[N, M, T] -> [1, N*M, T]: many users' rows as one's."""
    return jax.tree.map(lambda leaf: np.reshape(leaf, (1, -1, leaf.shape[-1])), batch_NxMxT)
