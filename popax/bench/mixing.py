"""Learned mixing measured: experts of some users, mixed for others, against each expert alone on later text."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.adapters.compose import Part
from popax.bench.curve.config import CurveConfig
from popax.bench.curve.run import members_of, train_members
from popax.data.pipeline import UserPipeline
from popax.errors import ConfigError
from popax.evaluation.columns import bits_per_byte
from popax.evaluation.dispatch import Classifier, ClassifierConfig, features, fitted
from popax.modeling.base import Base
from popax.objectives.base import LossSums
from popax.objectives.sft import sft
from popax.population.mixing import AdapterBasis, CEMConfig, generation, gradient_step, mixed_loss, side_by_side, start
from popax.training.config import TrainConfig
from popax.trees import member
from popax.types import Batch

WANTED = 0.7  # of the held-out users


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """experts: users whose adapters are mixed, the data's first ones. users: those after them, for whom they are.

    rows: of a user's past that a mix is learnt from. held_out_rows: of their future that it is scored on.
    descent_steps, descent_rate: Adam on the coefficients, from equal shares, beside the search.
    """

    experts: int = 8
    users: int = 24
    rows: int = 8
    held_out_rows: int = 16
    search: CEMConfig = CEMConfig()  # noqa: RUF009 - frozen
    descent_steps: int = 40
    descent_rate: float = 0.05

    def __post_init__(self):
        counts = (self.experts, self.users, self.rows, self.held_out_rows)
        if min(counts) < 1 or self.experts < 2:
            raise ConfigError(
                f"{self.experts} experts, {self.users} users, {self.rows} and {self.held_out_rows} rows: "
                "at least 2 experts and one of the others"
            )


class Mixer(NamedTuple):
    """The compiled programs: search(base, Search, batch), descend(base, mix, opt_state, batch), and score(base, mixes
    [C, M, K], batch), the sums of each mix on one user's batch."""

    search: Callable[..., Any]
    descend: Callable[..., Any]
    score: Callable[..., LossSums]


def bench_mixing(
    base: Base,
    pipeline: UserPipeline,
    users: Sequence[str],
    adapter: AdapterConfig,
    config: MixingConfig,
    train: TrainConfig,
    progress: Callable[[str], None] = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """A row for each held-out user: bits per byte on their future with the base, every expert, equal shares, and what
    the search and descent have learnt from their past."""
    owners = users[: config.experts]
    experts, classifier = _experts(base, pipeline, owners, adapter, train), _classifier(base, pipeline, owners)
    objective, optimizer = sft(base.model), optax.adam(config.descent_rate)
    loss, step, traced = mixed_loss(experts, objective), generation(experts, objective, config.search), []

    def counted(*operands: Any) -> Any:
        traced.append(None)  # once a program
        return step(*operands)

    mixer = Mixer(
        search=jax.jit(counted),
        descend=jax.jit(gradient_step(experts, objective, optimizer)),
        score=jax.jit(lambda params, mixes, batch: jax.vmap(lambda mix: loss(params, mix, batch)[1])(mixes)),
    )
    for number, user in enumerate(users[config.experts : config.experts + config.users]):
        began = time.monotonic()
        past, future = (
            _one(pipeline, user, split, rows)
            for split, rows in (("past", config.rows), ("future", config.held_out_rows))
        )
        search = start(experts, config.search, jax.random.key(number))
        for _ in range(config.search.generations):
            search, _ = mixer.search(base.params, search, past)
        mix = equal = jnp.full((experts.depth, experts.count), 1.0 / experts.count)
        state = optimizer.init(mix)
        for _ in range(config.descent_steps):
            mix, state, _ = mixer.descend(base.params, mix, state, past)
        alone = jnp.broadcast_to(jnp.eye(experts.count)[:, None], (experts.count, *equal.shape))
        mixes = jnp.concatenate((jnp.zeros_like(equal)[None], jnp.stack((equal, search.mean_MxK, mix)), alone))
        before, after = (bits_per_byte(mixer.score(base.params, mixes, batch)) for batch in (past, future))
        # Which expert's own text this user's past is most like.
        logps_BxK = np.asarray(classifier(features(base.model, base.params, past)))
        like = int(np.argmax(np.sum(logps_BxK[np.any(past.segments_BxT > 0, axis=1)], axis=0)))
        row = _row(user, before, after, search.mean_MxK, like)
        row |= {"programs": len(traced), "seconds": time.monotonic() - began}
        progress(
            f"{user}: base {row['base']:.4f}, best expert {row['best_expert']:.4f}, search {row['search']:.4f} "
            f"bits per byte, {row['seconds']:.0f} s"
        )
        yield row


def figures_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares of users for whom a mix is ahead of every expert, and mean bits per byte."""
    columns = ("base", "best_expert", "chosen_expert", "classified_expert", "equal", "search", "descent")
    means = {f"mean {name}": float(np.mean([row[name] for row in rows])) for name in columns}
    ahead = {
        f"{name} beats every expert": float(np.mean([row[name] < row["best_expert"] for row in rows]))
        for name in ("equal", "search", "descent")
    }
    chosen = float(np.mean([row["search"] < row["chosen_expert"] for row in rows]))
    programs = max(row["programs"] for row in rows)
    gains = {
        "search gains where it learnt": float(np.mean([row["past_base"] - row["past_search"] for row in rows])),
        "search gains on later text": float(np.mean([row["base"] - row["search"] for row in rows])),
    }
    counts = {"users": len(rows), "search programs": programs}
    return {**ahead, "search beats the chosen expert": chosen, **means, **gains, **counts}


def verdict(figures: dict[str, Any]) -> str:
    """Whether the search does what Transformer^2 hopes of it, and where it does not, why."""
    share, later = figures["search beats every expert"], figures["search gains on later text"]
    said = f"The search is ahead of every single expert for {share:.0%} of the held-out users"
    if share >= WANTED:
        return f"{said}: it does what it is for."
    learnt = figures["search gains where it learnt"]
    return (
        f"{said}, fewer than {WANTED:.0%}: it does not do what it is for. On the rows that it learns from it saves "
        f"{learnt:.4f} bits per byte, on later text {later:.4f} ({later / learnt:.0%} of that), and the best of all "
        f"experts is known in hindsight only: of the expert that does best on the same rows it is ahead for "
        f"{figures['search beats the chosen expert']:.0%}."
    )


def _experts(
    base: Base, pipeline: UserPipeline, users: Sequence[str], adapter: AdapterConfig, train: TrainConfig
) -> AdapterBasis:
    cohort = Cohort.of(adapter, base.model.sites())
    who = members_of(CurveConfig(users=len(users), seeds=1, rates=(1.0,)), users)
    trained = train_members(base, pipeline, who, cohort, dataclasses.replace(train, adapter=adapter, slots=len(users)))
    return side_by_side([Part(cohort, member(trained.adapters, at), trained.shared) for at in range(len(users))])


def _classifier(base: Base, pipeline: UserPipeline, owners: Sequence[str]) -> Classifier:
    """Of whose past a row is, among the experts' owners."""
    batch = pipeline.evaluation(owners, "past")
    labels_NxM, real_NxM = np.broadcast_arrays(np.arange(len(owners))[:, None], np.any(batch.segments_BxT > 0, axis=-1))
    rows = features(base.model, base.params, jax.tree.map(lambda leaf: leaf[real_NxM], batch))
    return fitted(rows, jnp.asarray(labels_NxM[real_NxM]), len(owners), ClassifierConfig())


def _one(pipeline: UserPipeline, user: str, split: str, rows: int) -> Batch:
    """The user's first rows of a split; always so many, the rest without weight: one shape, one program."""
    batch = member(pipeline.evaluation([user], split, rows), 0)
    pad = rows - batch.tokens_BxT.shape[0]
    return jax.tree.map(lambda leaf: np.pad(leaf, ((0, pad), (0, 0))), batch)


def _row(user: str, past: np.ndarray, future: np.ndarray, mix_MxK: jax.Array, like: int) -> dict[str, Any]:
    """past, future: of the base, equal shares, the search's mix, descent's, and each expert. like: the classifier's."""
    names = ("base", "equal", "search", "descent")
    experts = future[len(names) :]
    row = {"user": user, **{name: float(future[at]) for at, name in enumerate(names)}}
    row |= {f"past_{name}": float(past[at]) for at, name in enumerate(names)}
    return row | {
        "best_expert": float(np.min(experts)),
        "chosen_expert": float(experts[np.argmin(past[len(names) :])]),  # as one would choose without the future
        "classified_expert": float(experts[like]),
        "experts": [float(value) for value in experts],
        "share_of_each": [float(value) for value in jnp.mean(mix_MxK, axis=0)],
    }
