"""Users of a catalog, all that are meant, or a page of them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from popax.errors import CorruptRevisionError
from popax.store.database import Database
from popax.store.filters import UserFilter
from popax.store.loading import RevisionLoader
from popax.store.manifest import Manifest, UserRecord
from popax.store.reader import PARTS, all_users, part_keys, records_at

_AT_ONCE = 256


class Page(NamedTuple):
    """users: with their latest manifests. after: where the next page begins, None where there is none."""

    users: Sequence[tuple[UserRecord, Manifest]]
    after: str | None


def matching(database: Database, loader: RevisionLoader, where: UserFilter) -> Iterator[tuple[UserRecord, Manifest]]:
    """Each user that is meant, with the latest manifest, in the order of the ids' hashes.

    Raises CorruptRevisionError at the first record that is broken; `verify` names them all.
    """
    for record in all_users(database):
        latest = loader.latest(record)
        if where.matches(record, latest):
            yield record, latest


def page(
    database: Database, loader: RevisionLoader, where: UserFilter, *, limit: int, after: str | None, scan: int
) -> Page:
    """Up to `limit` users in the order of the ids' hashes, of which at most about `scan` records are read.

    after: a page's own, None for the first. Raises ValueError for an `after` that is no page's, and as `matching`.
    """
    if after is not None and (len(after) < 8 or not set(after) <= set("".join(PARTS))):
        raise ValueError(f"{after!r} is not the end of a page")
    found: list[tuple[UserRecord, Manifest]] = []
    last, read = None if after is None else f"user/{after}", 0
    for part in PARTS if after is None else PARTS[PARTS.index(after[0]) :]:
        keys = [key for key in part_keys(database, "user", part) if last is None or key > last]
        for at in range(0, len(keys), _AT_ONCE):
            for key, record in records_at(database, keys[at : at + _AT_ONCE]):
                if isinstance(record, CorruptRevisionError):
                    raise record
                last, read = key, read + 1
                if record is not None and where.matches(record, latest := loader.latest(record)):
                    found.append((record, latest))
                if len(found) >= limit or read >= scan:
                    return Page(found, last.removeprefix("user/"))
    return Page(found, None)
