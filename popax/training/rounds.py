"""Rounds of a run's directory: a new one, one that was stopped and is resumed, or the next one with what is new."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from popax.errors import ConfigError
from popax.population.slots import SlotTable
from popax.store.catalog import Catalog
from popax.store.checkpoint import latest_record
from popax.training.news import DataIdentity, latest_manifests, revision_of
from popax.training.record import CHECKPOINTS, CLOSE, RunRecord, discard_checkpoints

# Users who were left as they are, as `RunRecord.left` has them -> who has something new.
News = Callable[[Mapping[str, Mapping[str, Any]]], list[str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """What a round shares with the one it resumes, and but for the data with those before it."""

    settings: Mapping[str, Any]
    tokenizer: str
    data: DataIdentity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Closed:
    """A stopped round that was closed. in_training: who lost their seat, and the revision that they have (0: none)."""

    run: str
    iteration: int
    in_training: Mapping[str, int]


class Opened(NamedTuple):
    """record: of the round to train. news: False where it is over and nobody has anything new: there is none."""

    record: RunRecord
    closed: Closed | None = None
    news: bool = True


class Standing(NamedTuple):
    """Where the latest checkpoint stands."""

    run: str
    iteration: int
    table: SlotTable

    def is_over(self, record: RunRecord) -> bool:
        """Whether this is the end of that round."""
        return self.run == record.run and not self.table.occupied and self.table.next == len(record.queue)


def open_round(directory: Path, identity: Identity, catalog: Catalog, news: News, *, close: bool = False) -> Opened:
    """The round that a command with this identity trains.

    close: a stopped round is not resumed, but followed by another one. Raises ConfigError where the directory's run has
    other settings, or its round was stopped and cannot be resumed with this data or tokenizer.
    """
    record = RunRecord.read(directory)
    if record is None:
        return _next(directory, identity, news({}), RunRecord.new({}, []), 0)
    record.check_settings(identity.settings, directory)
    standing = None if record.finished else standing_of(directory)
    if record.finished or (standing is not None and standing.is_over(record)):
        record.check_tokenizer(identity.tokenizer, directory)
        queue = news(record.left)
        if not queue:
            return Opened(record.replace(finished=True), news=False)
        ended = record.ends if standing is None else standing.iteration
        return _next(directory, identity, queue, record, ended or record.begins)
    if not close:
        record.check_resumable(identity.tokenizer, identity.data, directory)
        return Opened(record)
    seated = [] if standing is None or standing.run != record.run else [u for u in standing.table.users if u]
    found = latest_manifests(catalog, seated)
    have = {user: revision_of(latest) for user, latest in zip(seated, found, strict=True)}
    ended = record.begins if standing is None else standing.iteration
    closed = Closed(run=record.run, iteration=ended, in_training=have)
    opened = _next(directory, identity, news(record.left), record, ended)
    return opened._replace(closed=closed)


def _next(directory: Path, identity: Identity, queue: list[str], before: RunRecord, begins: int) -> Opened:
    """The round after `before`. Its checkpoints go first: a checkpoint is always of the round in the record."""
    record = RunRecord.new(
        identity.settings,
        queue,
        round=before.round + 1 if before.settings else 1,
        begins=begins,
        tokenizer=identity.tokenizer,
        data=dataclasses.asdict(identity.data),
        finished=not queue,
        ends=None if queue else begins,
        left=before.left,
    )
    discard_checkpoints(directory)
    return Opened(record.write(directory), news=bool(queue))


def standing_of(directory: Path) -> Standing | None:
    """Of the latest checkpoint in a run's directory; None where there is none."""
    if (found := latest_record(directory / CHECKPOINTS)) is None:
        return None
    step, record = found
    table = record["table"]
    return Standing(record["run"], step, SlotTable(users=tuple(table["users"]), next=table["next"]))


def refuse_stopped(directory: Path, data: Path) -> None:
    """Raises ConfigError where a round of this directory, or of a cohort's folder in it, was stopped: its data, which
    lie in `data`, must stay what they are."""
    for place in (directory, *sorted(directory.glob("cohort-*"))):
        record = RunRecord.read(place)
        if record is None or record.finished:
            continue
        standing = standing_of(place)
        if standing is None or not standing.is_over(record):
            raise ConfigError(
                f"{place} holds run {record.run}, stopped while it trained on other data than is given now: go on with "
                f"the data it has by --data {data}, or close it with {CLOSE} (users in training fall back to their "
                "last revision) and start a new round with what is given now"
            )
