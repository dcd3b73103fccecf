"""What a round did, as its record, its end and the catalog tell it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from popax.data.users import UserDataset
from popax.errors import PopulationError
from popax.store.catalog import Catalog
from popax.training.aside import SetAside
from popax.training.news import AT_ONCE, latest_manifests, revision_of
from popax.training.record import RECORD_FILE, RunRecord, discard_checkpoints
from popax.training.rounds import Closed, Opened
from popax.training.stream import Seating


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunReport:
    """What a run did. finished is False where it was stopped; the same call then continues it.

    round: of the run's directory, from 1; iterations: of the population in this round. trained: users with a new
    revision. nothing_to_learn, set_aside: left as they are, in this round or in an earlier one and without news since.
    too_few: below min_examples. listed_twice: named more than once, and trained once. up_to_date: how many had nothing
    new. skipped_steps: of the users trained, steps that were not taken because something in them was not finite.
    closed: the stopped round that this one took the place of.
    """

    run: str
    round: int
    trained: tuple[str, ...]
    nothing_to_learn: tuple[str, ...]
    set_aside: tuple[SetAside, ...]
    too_few: tuple[str, ...]
    listed_twice: tuple[str, ...]
    up_to_date: int
    iterations: int
    skipped_steps: int
    finished: bool
    closed: Closed | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: what `popax train` writes beside its figures."""
        return dataclasses.asdict(self)


class Listing(NamedTuple):
    """Who is meant to be trained, each once, and who is left out before it begins."""

    names: list[str]
    too_few: tuple[str, ...]
    listed_twice: tuple[str, ...]
    refused: tuple[SetAside, ...]

    @classmethod
    def of(cls, dataset: UserDataset, users: Sequence[str] | None, min_examples: int) -> "Listing":
        """users: None is everybody in the dataset. Those who were refused when it was built are set aside."""
        counts, refused = dataset.counts(), dataset.refused()
        given = [*counts, *refused] if users is None else list(users)
        listed = dict.fromkeys(given, 0)
        for user in given:
            listed[user] += 1
        names, too_few, aside = [], [], []
        for user in listed:
            if user in refused:
                told = refused[user]
                aside.append(SetAside(user=user, reason=told.reason, record=told.record, file=told.file))
            elif user not in counts:
                aside.append(SetAside(user=user, reason=f"the dataset of {len(counts)} users has no such user"))
            else:
                (names if counts[user] >= min_examples else too_few).append(user)
        twice = tuple(user for user, times in listed.items() if times > 1)
        return cls(names, tuple(too_few), twice, tuple(aside))


def finish_round(directory: Path, record: RunRecord, end: Seating, dataset: UserDataset, catalog: Catalog) -> RunRecord:
    """The record of a round that is over, kept. Idempotent.

    Raises PopulationError, and leaves nothing of the run, where it was the first round and everybody was set aside.
    """
    faulty = [one for one in end.aside if one.faulty]
    if record.round == 1 and faulty and len(end.aside) == len(record.queue):
        discard_checkpoints(directory)
        (directory / RECORD_FILE).unlink(missing_ok=True)
        raise PopulationError(
            f"nobody was trained: all {len(record.queue)} users were set aside; the first, {faulty[0].user!r}: "
            f"{faulty[0].reason}"
        )
    users = [one.user for one in end.aside]
    digests = dataset.digests(users)
    found = zip(users, latest_manifests(catalog, users), strict=True)
    had = {user: (digests[user], revision_of(latest)) for user, latest in found}
    return record.with_left(end.aside, had).replace(finished=True, ends=end.iteration).write(directory)


def report_of(opened: Opened, listing: Listing, catalog: Catalog, *, end: Seating | None) -> RunReport:
    """end: where the round stands now; None where there was nothing to do, and so no round."""
    record = opened.record
    queue = record.queue if end is not None else []
    aside = {one.user: one for one in end.aside} if end is not None else {}
    seated = {user for user in end.table.users if user is not None} if end is not None else set()
    trained = [user for user in (queue[: end.table.next] if end else []) if user not in seated and user not in aside]
    names, queued = set(listing.names), set(queue)
    earlier = [one for user, one in before(record).items() if user in names and user not in queued]
    left = [*aside.values(), *earlier]
    return RunReport(
        run=record.run,
        round=record.round,
        trained=tuple(trained),
        nothing_to_learn=tuple(one.user for one in left if not one.faulty),
        set_aside=(*listing.refused, *(one for one in left if one.faulty)),
        too_few=listing.too_few,
        listed_twice=listing.listed_twice,
        up_to_date=len(listing.names) - len(queue) - len(earlier),
        iterations=end.iteration - record.begins if end is not None else 0,
        skipped_steps=_skipped_steps(catalog, trained),
        finished=end is None or record.finished,
        closed=opened.closed,
    )


def before(record: RunRecord) -> dict[str, SetAside]:
    """Those whom the record says are left as they are."""
    fields = [field.name for field in dataclasses.fields(SetAside)]
    return {user: SetAside(**{name: one[name] for name in fields}) for user, one in record.left.items()}


def _skipped_steps(catalog: Catalog, users: Sequence[str]) -> int:
    total = 0
    for at in range(0, len(users), AT_ONCE):
        for found in catalog.records(users[at : at + AT_ONCE]):
            total += int(catalog.latest(found).metrics.get("skipped", 0)) if found is not None else 0
    return total
