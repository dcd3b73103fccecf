"""A whole pretraining run: users' text in, a base with its tokenizer out; stopped and resumed at will."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from popax.data.digest import digest_of_users
from popax.data.pipeline import PipelineConfig, UserPipeline
from popax.data.places import Refused
from popax.data.tokenize import Tokenizer, load_tokenizer
from popax.data.users import UserDataset
from popax.errors import ConfigError, DataError
from popax.evaluation.columns import row_chunks
from popax.modeling.base import new_base, save_base
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.objectives.sft import sft
from popax.population.described import described
from popax.training.inputs import check_fits, make_tokenizer, save_once, texts_of
from popax.training.news import DataIdentity
from popax.training.pretrain import PretrainConfig, PretrainHooks, pretrain, schedule
from popax.training.record import RunRecord
from popax.types import NO_ADAPT, Params

GROUP_EXAMPLES = 512
TOKENIZER_EXAMPLES = 50_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseReport:
    """What a pretraining run did. base: its directory, None where the run was stopped; the same call then continues.

    held_out: bits per byte on what past_fraction holds out, NaN where that is nothing.
    """

    base: Path | None
    steps: int
    num_params: int
    users: int
    held_out: float


def pretrain_base(
    dataset: UserDataset,
    users: Sequence[str],
    model_config: ModelConfig,
    pipeline_config: PipelineConfig,
    config: PretrainConfig,
    *,
    tokenizer: str,
    directory: Path,
    hooks: PretrainHooks | None = None,
) -> BaseReport:
    """Train a base on these users' text, every row of it equally often, and save it as `directory`/base.

    tokenizer: as `make_tokenizer` reads it. The directory also holds the run's record and checkpoints.
    """
    model, grouped = Model(model_config), group_users(dataset, users)
    settings = {
        "model": model_config.to_dict(),
        "pretrain": dataclasses.asdict(config),
        "data": dataclasses.asdict(pipeline_config),
        "tokenizer": tokenizer,
        "users": len(users),
        "examples": sum(map(dataset.num_examples, users)),
        "text": DataIdentity.of(dataset, users).digest,
        "schedule": described(schedule(config)),
    }
    if (record := RunRecord.read(directory)) is None:
        RunRecord.new(settings, []).write(directory)
    else:
        record.check_settings(settings, directory)
        _refuse_older(record, directory)
    chosen = _tokenizer(tokenizer, dataset, users, directory / "tokenizer")
    check_fits(model, chosen, pipeline_config.seq_len)
    pipeline = UserPipeline(grouped, chosen, pipeline_config)
    batches = pipeline.mixed(grouped.users(), by="row")
    params, done = pretrain(model, batches.batch, config, directory=directory / "checkpoints", hooks=hooks)
    finished = done >= config.steps
    target = directory / "base"
    if finished and not target.exists():
        save_once(target, lambda place: _save(place, model, params, chosen, directory))
    return BaseReport(
        base=target if finished else None,
        steps=done,
        num_params=model.num_params,
        users=len(users),
        held_out=held_out(model, params, pipeline) if finished else math.nan,
    )


def _refuse_older(record: RunRecord, directory: Path) -> None:
    """Raises ConfigError where an older popax stopped, whose steps had other rates; a base that it made stays."""
    if "schedule" not in record.settings and not (directory / "base").exists():
        raise ConfigError(
            f"{directory} holds run {record.run} that an older popax stopped, with another schedule than this one's: "
            "let that version finish it, or choose another directory"
        )


def group_users(dataset: UserDataset, users: Sequence[str], examples: int = GROUP_EXAMPLES) -> UserDataset:
    """The dataset with users of little text put together, about so many examples each: their documents share rows."""
    groups: list[list[str]] = []
    room = 0
    for user in users:
        if room <= 0:
            groups.append([])
            room = examples
        groups[-1].append(user)
        room -= dataset.num_examples(user)
    if not groups:
        raise DataError("no users to pretrain on: the list is empty")
    return UserDataset(_Grouped(dataset, groups))


def held_out(model: Model, params: Params, pipeline: UserPipeline, rows: int = 16) -> float:
    """Bits per byte on the future rows of everyone in the pipeline; NaN where there is none."""
    objective = sft(model)
    score = jax.jit(lambda params, batch: objective(params, NO_ADAPT, batch, None)[2])
    nll = num_bytes = 0.0
    for user in pipeline.dataset.users():
        for chunk in row_chunks(pipeline.evaluation([user], "future"), rows):
            sums = score(params, jax.tree.map(lambda leaf: leaf[0], chunk))
            nll, num_bytes = nll + float(sums.nll), num_bytes + float(sums.target_bytes)
    return nll / (math.log(2) * num_bytes) if num_bytes else math.nan


def _tokenizer(spec: str, dataset: UserDataset, users: Sequence[str], place: Path) -> Tokenizer:
    """Made once, of every k-th user's text: merges need no more. A resumed run reads back the one it began with."""
    if not place.exists():
        stride = -(-sum(map(dataset.num_examples, users)) // TOKENIZER_EXAMPLES)
        examples = (example for user in users[:: max(1, stride)] for example in dataset.examples(user))
        made = make_tokenizer(spec, lambda: texts_of(examples))
        save_once(place, made.save)
    return load_tokenizer(place)


def _save(place: Path, model: Model, params: Params, tokenizer: Tokenizer, directory: Path) -> None:
    save_base(place, new_base(model, params, source=f"popax pretrain, {directory.name}"))
    tokenizer.save(place)


class _Grouped:
    """The reader of `group_users`: a group is one user whose examples are its users', one user after the other."""

    def __init__(self, dataset: UserDataset, groups: Sequence[Sequence[str]]):
        self._dataset = dataset
        self._groups = {f"group-{index:06d}": list(users) for index, users in enumerate(groups)}

    def users(self) -> list[str]:
        return list(self._groups)

    def record_ids(self, user: str) -> Sequence[int]:
        return range(sum(self._dataset.num_examples(one) for one in self._groups[user]))

    def examples(self, user: str) -> list[Any]:
        return [example for one in self._groups[user] for example in self._dataset.examples(one)]

    def counts(self) -> dict[str, int]:
        return {user: len(self.record_ids(user)) for user in self._groups}

    def digests(self, users: Sequence[str]) -> dict[str, str]:
        return {
            user: digest_of_users(self._dataset.digests(own), own) for user in users for own in [self._groups[user]]
        }

    def refused(self) -> dict[str, Refused]:
        return {}

    def place(self, example: Any) -> tuple[str | None, int]:
        return self._dataset.place(example)
