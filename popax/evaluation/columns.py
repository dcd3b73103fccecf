"""The four columns of every personalisation figure: base, one shared adapter, the user's own, another user's."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from popax.adapters.cohort import Cohort
from popax.errors import DataError
from popax.memo import built_once
from popax.objectives.base import LossSums, Objective
from popax.population.step import population_loss
from popax.types import NO_ADAPT, AdapterState, Batch, Params

COLUMNS = ("base", "shared", "own", "wrong")


class HeldOut(Protocol):
    """The data side of an evaluation (popax.data.pipeline.UserPipeline)."""

    def evaluation(self, users: Sequence[str | None], split: str, max_rows: int | None = None) -> Batch: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserScores:
    """One user's bits per byte on held-out text in each column (NaN where a column was not asked for)."""

    user: str
    target_bytes: int
    base: float
    shared: float
    own: float
    wrong: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """group: users scored together; rows: rows of each scored at a time (both bound memory).

    split: which text; max_rows: at most so many rows of each user, None for all of it.
    """

    group: int = 16
    rows: int = 4
    split: str = "future"
    max_rows: int | None = None


def bits_per_byte(sums: LossSums) -> np.ndarray:
    """nll / (ln 2 * bytes); NaN without bytes. Comparable over tokenizers, unlike nats per token."""
    nll, count = np.asarray(sums.nll, np.float64), np.asarray(sums.target_bytes, np.float64)
    return np.divide(nll, math.log(2) * count, out=np.full_like(nll, np.nan), where=count > 0)


@built_once
def _adapted(cohort: Cohort, objective: Objective) -> Callable[..., LossSums]:
    return jax.jit(population_loss(cohort, objective))


@built_once
def _plain(objective: Objective) -> Callable[[Params, Batch], LossSums]:
    return jax.jit(jax.vmap(lambda params, batch: objective(params, NO_ADAPT, batch, None)[2], in_axes=(None, 0)))


class Scorer:
    """Scores users group by group with one compiled program for adapters and one for the base."""

    def __init__(self, objective: Objective, cohort: Cohort, base: Params, shared: AdapterState, config: EvalConfig):
        self._base, self._shared, self._config = base, shared, config
        self._adapted, self._plain = _adapted(cohort, objective), _plain(objective)

    def base_sums(self, data: HeldOut, users: Sequence[str]) -> LossSums:
        """The base alone on each user's text; leaves are [users]."""
        return self._over_groups(data, users, lambda group, batch: self._plain(self._base, batch))

    def adapter_sums(
        self, data: HeldOut, users: Sequence[str], adapters_of: Callable[[Sequence[str]], AdapterState]
    ) -> LossSums:
        """adapters_of(group) gives the stacked adapters, [N, ...], to score on the group's own text."""
        cache: dict[tuple[str, ...], AdapterState] = {}

        def score(group: tuple[str, ...], batch: Batch) -> LossSums:
            if group not in cache:
                cache.clear()
                cache[group] = adapters_of(group)
            return self._adapted(self._base, self._shared, cache[group], batch)

        return self._over_groups(data, users, score)

    def _over_groups(self, data: HeldOut, users: Sequence[str], score: Callable[..., LossSums]) -> LossSums:
        totals = []
        for start in range(0, len(users), self._config.group):
            real = tuple(users[start : start + self._config.group])
            # The last group is filled up with its first user: one shape, one program.
            group = real + real[:1] * (self._config.group - len(real))
            batch = data.evaluation(group, self._config.split, self._config.max_rows)
            sums = [score(group, chunk) for chunk in row_chunks(batch, self._config.rows)]
            total = jax.tree.map(lambda *parts: np.sum([np.asarray(part) for part in parts], axis=0), *sums)
            keep = slice(len(real))
            totals.append(LossSums(*(leaf[keep] for leaf in total)))
        if not totals:
            raise DataError("no users to evaluate: the list is empty")
        return jax.tree.map(lambda *parts: np.concatenate(parts), *totals)


def row_chunks(batch_NxMxT: Batch, rows: int) -> list[Batch]:
    """Chunks of exactly `rows` rows, the last one padded with rows of weight 0."""
    count = batch_NxMxT.tokens_BxT.shape[1]

    def chunk(leaf: np.ndarray, start: int) -> np.ndarray:
        part = leaf[:, start : start + rows]
        return np.pad(part, ((0, 0), (0, rows - part.shape[1]), (0, 0)))

    return [
        jax.tree.map(lambda leaf, start=start: chunk(leaf, start), batch_NxMxT)
        for start in range(0, max(count, 1), rows)
    ]


def four_columns(
    scorer: Scorer,
    data: HeldOut,
    users: Sequence[str],
    own: Callable[[Sequence[str]], AdapterState],
    shared: Callable[[Sequence[str]], AdapterState] | None = None,
) -> list[UserScores]:
    """Each user's held-out text under the base, the shared adapter, their own, and the next user's ("wrong")."""
    if len(users) < 2:
        raise DataError(f"{len(users)} user(s): the wrong-user column needs at least two")
    following = {user: users[(index + 1) % len(users)] for index, user in enumerate(users)}
    base = scorer.base_sums(data, users)
    columns = {
        "base": base,
        "own": scorer.adapter_sums(data, users, own),
        "wrong": scorer.adapter_sums(data, users, lambda group: own([following[user] for user in group])),
    }
    if shared is not None:
        columns["shared"] = scorer.adapter_sums(data, users, shared)
    values = {name: bits_per_byte(sums) for name, sums in columns.items()}
    absent = np.full(len(users), np.nan)
    return [
        UserScores(
            user=user,
            target_bytes=int(base.target_bytes[index]),
            **{name: float(values.get(name, absent)[index]) for name in COLUMNS},
        )
        for index, user in enumerate(users)
    ]


def figures(scores: Sequence[UserScores]) -> dict[str, Any]:
    """Fractions of users whose own adapter is better (fewer bits), and the mean bits per byte of each column."""
    scored = [row for row in scores if row.target_bytes > 0]

    def fraction(other: str) -> float:
        pairs = [(row.own, getattr(row, other)) for row in scored if not math.isnan(getattr(row, other))]
        return sum(own < value for own, value in pairs) / len(pairs) if pairs else float("nan")

    means = {
        f"mean_{name}_bits_per_byte": float(np.mean([getattr(row, name) for row in scored])) if scored else float("nan")
        for name in COLUMNS
    }
    return {
        "users": len(scored),
        "own_beats_base": fraction("base"),
        "own_beats_wrong": fraction("wrong"),
        "own_beats_shared": fraction("shared"),
        **means,
    }
