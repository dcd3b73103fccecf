"""One population a method: users x seeds x learning rates are its members; all are scored on the users' future text."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.bench.curve.choice import choices
from popax.bench.curve.config import CurveConfig, name_of
from popax.data.pipeline import UserPipeline
from popax.evaluation.columns import EvalConfig, Scorer, bits_per_byte, row_chunks
from popax.modeling.base import Base
from popax.objectives.base import LossSums
from popax.objectives.sft import sft
from popax.population.state import init_population, stored_adapters
from popax.training.compiled import Programs, compile_programs
from popax.training.config import TrainConfig
from popax.training.fit import BatchesAhead, fit
from popax.training.members import user_key
from popax.training.stream import pad_rows
from popax.types import AdapterState, Batch


class Members(NamedTuple):
    """Who is who: member i is users[user_N[i]] with this seed and this factor on the rate. wrong_N: the member with the
    next user's adapter, of the same seed and rate."""

    names: list[str]
    user_N: np.ndarray
    seed_N: np.ndarray
    rate_N: np.ndarray
    wrong_N: np.ndarray


def members_of(config: CurveConfig, users: Sequence[str]) -> Members:
    grid = np.stack(np.meshgrid(config.rates, np.arange(config.seeds), np.arange(len(users)), indexing="ij"), axis=-1)
    rate_N, seed_N, user_N = grid.reshape(-1, 3).T
    user_N, seed_N = user_N.astype(int), seed_N.astype(int)
    block = np.arange(len(user_N)) - user_N
    wrong_N = block + (user_N + 1) % len(users)
    return Members([str(users[user]) for user in user_N], user_N, seed_N, rate_N, wrong_N)


def bench_curve(
    base: Base,
    pipeline: UserPipeline,
    users: Sequence[str],
    config: CurveConfig,
    train: TrainConfig,
    evaluation: EvalConfig,
    progress: Callable[[str], None] = lambda line: None,
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one method after the other: for each seed and rate its means over users, and each user's own numbers
    in the order of `users`. See `choice.figures_of`."""
    cohorts = [Cohort.of(adapter, base.model.sites()) for adapter in config.adapters]
    who = members_of(config, users)
    plain: np.ndarray | None = None
    for cohort in cohorts:
        adapter, began = cohort.config, time.monotonic()
        own = dataclasses.replace(train, adapter=adapter, slots=len(who.names))
        if plain is None:
            scorer = Scorer(sft(base.model), cohort, base.params, {}, evaluation)
            plain = bits_per_byte(scorer.base_sums(pipeline, users))
        trained = train_members(base, pipeline, who, cohort, own)
        adapters, shared, programs = trained.adapters, trained.shared, trained.programs
        future = pipeline.evaluation(who.names, evaluation.split, evaluation.max_rows)
        wrong = jax.tree.map(lambda leaf: leaf[who.wrong_N], adapters)
        scored = [
            bits_per_byte(_sums(base, programs, shared, each, future, evaluation.rows)) for each in (adapters, wrong)
        ]
        rows = list(_rows(config, adapter, cohort, who, plain, scored[0], scored[1], trained.validation_N))
        for row in rows:
            row["seconds"] = time.monotonic() - began
        [(method, choice)] = choices(rows).items()
        progress(
            f"{method}: {choice.bytes:,} bytes a user, gain {choice.gain_S.mean():+.4f} bits per byte at "
            f"{choice.rate:g} of its rate, {rows[0]['seconds']:.0f} s"
        )
        yield rows


class Trained(NamedTuple):
    """adapters: each member's at their best validation, [N, ...]; validation_N: its loss in nats a target."""

    adapters: AdapterState
    validation_N: np.ndarray
    shared: AdapterState
    programs: Programs


def train_members(base: Base, pipeline: UserPipeline, who: Members, cohort: Cohort, config: TrainConfig) -> Trained:
    """Train all members together, with as many slots."""
    shared = jax.jit(lambda params: cohort.shared(*base.model.site_arrays(params)))(base.params)
    programs = compile_programs(base.model, cohort, config)
    settings = config.member_settings(config.steps)
    rate_N = jnp.asarray(cohort.method.learning_rate * who.rate_N, jnp.float32)
    settings = settings._replace(learning_rate=rate_N)
    keys_N = jnp.stack([user_key(int(seed), name) for seed, name in zip(who.seed_N, who.names, strict=True)])
    start = jax.jit(lambda keys, own: init_population(cohort, config.optimizer, keys, own, track_best=True))
    state = start(keys_N, settings)
    rows = config.validation_rows
    validation = jax.tree.map(
        lambda leaf: pad_rows(leaf, rows), pipeline.evaluation(who.names, "validation", max_rows=rows)
    )

    def make(step: int) -> Batch:
        # Another seed reads on where the one before it stops: other batches, in another order.
        steps = [step + int(seed) * config.steps for seed in who.seed_N]
        return pipeline.population(who.names, steps, config.accumulate)

    with BatchesAhead(make) as batches:
        state = fit(
            state,
            steps=config.steps,
            step=lambda state, batch: programs.step(base.params, shared, state, batch),
            batches=batches,
            observe=lambda state: programs.validated(base.params, shared, state, validation),
            every=config.round_length,
        )
    assert state.best is not None
    return Trained(stored_adapters(cohort, state), np.asarray(state.best.loss), shared, programs)


def _sums(
    base: Base, programs: Programs, shared: AdapterState, adapters: AdapterState, batch: Batch, rows: int
) -> LossSums:
    parts = [programs.loss(base.params, shared, adapters, chunk) for chunk in row_chunks(batch, rows)]
    return jax.tree.map(lambda *leaves: np.sum([np.asarray(leaf) for leaf in leaves], axis=0), *parts)


def _rows(
    config: CurveConfig,
    adapter: AdapterConfig,
    cohort: Cohort,
    who: Members,
    plain_U: np.ndarray,
    own_N: np.ndarray,
    wrong_N: np.ndarray,
    validation_N: np.ndarray,
) -> Iterator[dict[str, Any]]:
    state = jax.tree.leaves(cohort.abstract())
    base_N = plain_U[who.user_N]
    for rate in config.rates:
        for seed in range(config.seeds):
            at = (who.rate_N == rate) & (who.seed_N == seed)
            yield {
                "method": name_of(adapter),
                "parameters": cohort.num_params,
                "bytes": sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in state),
                "rate": rate,
                "learning_rate": rate * cohort.method.learning_rate,
                "seed": seed,
                "validation": float(np.mean(validation_N[at])),
                "base": float(np.mean(base_N[at])),
                "own": float(np.mean(own_N[at])),
                "wrong": float(np.mean(wrong_N[at])),
                "gain": float(np.mean((base_N - own_N)[at])),
                "forgetting": float(np.mean((wrong_N - base_N)[at])),
                "own_beats_base": float(np.mean((own_N < base_N)[at])),
                "own_beats_wrong": float(np.mean((own_N < wrong_N)[at])),
                "gains": (base_N - own_N)[at].tolist(),
                "losses": (wrong_N - base_N)[at].tolist(),
            }
