"""Committing revisions: rows, manifests and user pointers in one atomic transaction."""

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import tensorstore as ts

import popax
from popax.errors import ConflictError
from popax.store.cohort import StoredCohort
from popax.store.commit import Commit, Revision
from popax.store.database import Database, is_conflict, storage_error
from popax.store.layout import row_digest
from popax.store.manifest import Manifest, UserRecord, now
from popax.store.reader import read_manifests, read_users, stored_form
from popax.store.records import manifest_key, next_row_key, row_key, seal, shown, unseal, user_key

T = TypeVar("T")

# Writers of other users collide only in the allocation of rows; each round at least one of them gets through.
ATTEMPTS = 100
LONGEST_PAUSE_S = 0.1


def write(database: Database, cohort: StoredCohort, commits: Sequence[Commit]) -> list[Manifest]:
    """All of the commits in one transaction, or none; what the same run already committed is returned, not rewritten.

    Raises ConflictError where a parent is not the latest, another writer committed one of the users meanwhile, or a
    user appears twice; PopulationError where an adapter does not fit the cohort; StorageError where the store refuses.
    """
    packed = [cohort.layout.pack(commit.adapter) for commit in commits]
    entries = [Revision.of(commit, row_digest(row)) for commit, row in zip(commits, packed, strict=True)]

    def place(store: ts.KvStore, fresh: Sequence[int]) -> list[Revision]:
        start = write_rows(store, cohort, [packed[index] for index in fresh])
        return [dataclasses.replace(entries[index], row=row) for row, index in enumerate(fresh, start)]

    return _write(database, cohort, entries, place)


def stage(database: Database, cohort: StoredCohort, commits: Sequence[Commit], shard: int) -> list[Revision]:
    """Write the rows into a shard of their own, where nobody sees them before `publish`. Durable when this returns.

    What the same run already committed is left out. Errors as `write`, but for conflicts between users' revisions.
    """
    packed = [cohort.layout.pack(commit.adapter) for commit in commits]
    entries = [Revision.of(commit, row_digest(row)) for commit, row in zip(commits, packed, strict=True)]
    users = read_users(database, None, [entry.user for entry in entries])
    kept = _already_committed(database, cohort, entries, users)
    fresh = [index for index, manifest in enumerate(kept) if manifest is None]
    if not fresh:
        return []

    def rows(transaction: ts.Transaction) -> list[Revision]:
        store = database.shard(shard).with_transaction(transaction)
        start = write_rows(store, cohort, [packed[index] for index in fresh])
        return [dataclasses.replace(entries[index], row=row, shard=shard) for row, index in enumerate(fresh, start)]

    return _retried(database, len(fresh), rows)


def publish(database: Database, cohort: StoredCohort, staged: Sequence[Revision]) -> list[Manifest]:
    """The manifests and pointers of staged revisions, of all shards, in one transaction: all are visible, or none."""
    return _write(database, cohort, staged, lambda store, fresh: [staged[index] for index in fresh])


def _write(
    database: Database,
    cohort: StoredCohort,
    entries: Sequence[Revision],
    place: Callable[[ts.KvStore, Sequence[int]], list[Revision]],
) -> list[Manifest]:
    """place(store in the transaction, indices of the entries to write): these entries, with the rows they have."""
    _refuse_twice(entries)
    before: list[int] = []

    def work(transaction: ts.Transaction) -> list[Manifest]:
        users = read_users(database, transaction, [entry.user for entry in entries])
        current = [record.latest if record else 0 for record in users]
        _refuse_changed(entries, before or current, current)
        before[:] = current
        kept = _already_committed(database, cohort, entries, users)
        fresh = [index for index, manifest in enumerate(kept) if manifest is None]
        _refuse_other_parents([entries[index] for index in fresh], [current[index] for index in fresh])
        if not fresh:
            return [manifest for manifest in kept if manifest is not None]
        store = database.kvstore.with_transaction(transaction)
        placed = place(store, fresh)
        made = _write_manifests(store, cohort, [(one, users[index]) for one, index in zip(placed, fresh, strict=True)])
        return [manifest or made.pop(0) for manifest in kept]

    return _retried(database, len(entries), work)


def _retried(database: Database, count: int, work: Callable[[ts.Transaction], T]) -> T:
    """work(transaction), committed; again where another writer changed what it had read."""
    for attempt in range(ATTEMPTS):
        transaction = ts.Transaction(atomic=True, repeatable_read=True)
        try:
            made = work(transaction)
            transaction.commit_sync()
            return made
        except (ValueError, OSError) as error:
            if not is_conflict(error):
                raise storage_error(database.place, error) from error
        finally:
            transaction.abort()  # no effect once committed
        time.sleep(random.uniform(0, min(LONGEST_PAUSE_S, 0.002 * 2 ** min(attempt, 10))))
    raise ConflictError(
        f"{count} commits to {database.place!r} lost to other writers {ATTEMPTS} times; "
        "commit larger batches from fewer writers"
    )


def write_rows(store: ts.KvStore, cohort: StoredCohort, rows: Sequence[np.ndarray]) -> int:
    """Put the rows and the next free index into the store's transaction; returns the first row's index."""
    allocated = store.read(next_row_key(cohort.id)).result()
    start = unseal(allocated.value)["next"] if allocated.state == "value" else 0
    writes = [store.write(next_row_key(cohort.id), seal({"next": start + len(rows)}))]
    writes += [store.write(row_key(cohort.id, index), row.tobytes()) for index, row in enumerate(rows, start)]
    for write_future in writes:
        write_future.result()
    return start


def _write_manifests(
    store: ts.KvStore, cohort: StoredCohort, entries: Sequence[tuple[Revision, UserRecord | None]]
) -> list[Manifest]:
    """Put manifests and pointers into the store's transaction, of revisions whose rows are there or in it."""
    created, made, writes = now(), [], []
    for revision, record in entries:
        manifest = Manifest(
            user=revision.user,
            revision=(record.latest if record else 0) + 1,
            cohort=cohort.id,
            row=revision.row,
            shard=revision.shard,
            digest=revision.digest,
            base_digest=cohort.base_digest,
            config=cohort.config_record,
            created=created,
            version=popax.__version__,
            parent=record.latest if record else None,
            run=revision.run,
            hparams=revision.hparams,
            provenance=revision.provenance,
            metrics=revision.metrics,
        )
        promoted = record.promoted if record else None
        pointers = UserRecord(user=revision.user, latest=manifest.revision, promoted=promoted)
        writes.append(store.write(manifest_key(revision.user, manifest.revision), seal(stored_form(manifest))))
        writes.append(store.write(user_key(revision.user), seal(pointers.to_dict())))
        made.append(manifest)
    for write_future in writes:
        write_future.result()
    return made


def _already_committed(
    database: Database, cohort: StoredCohort, entries: Sequence[Revision], users: Sequence[UserRecord | None]
) -> list[Manifest | None]:
    """The latest manifest of each user for whom it holds the same bytes of the same run."""
    asked = [
        index
        for index, (entry, record) in enumerate(zip(entries, users, strict=True))
        if entry.run is not None and record is not None
    ]
    found: list[Manifest | None] = [None] * len(entries)
    requests = [(users[index].user, users[index].latest) for index in asked]  # pyright: ignore[reportOptionalMemberAccess]
    cohorts = {cohort.id: cohort}
    for index, manifest in zip(asked, read_manifests(database, requests, cohorts.get), strict=True):
        same = manifest is not None and manifest.run == entries[index].run and manifest.digest == entries[index].digest
        found[index] = manifest if same else None
    return found


def _refuse_twice(entries: Sequence[Revision]) -> None:
    users = [entry.user for entry in entries]
    if len(set(users)) != len(users):
        twice = next(user for index, user in enumerate(users) if user in users[:index])
        raise ConflictError(f"user {shown(twice)} appears twice in one batch; commit the second revision in the next")


def _refuse_changed(entries: Sequence[Revision], before: Sequence[int], current: Sequence[int]) -> None:
    for entry, old, new in zip(entries, before, current, strict=True):
        if old != new:
            raise ConflictError(
                f"user {shown(entry.user)}: another writer committed revision {new} meanwhile, nothing of this commit "
                f"was written; load it and commit on top of it with parent={new}"
            )


def _refuse_other_parents(entries: Sequence[Revision], latest: Sequence[int]) -> None:
    for entry, revision in zip(entries, latest, strict=True):
        if entry.parent != "latest" and (entry.parent or 0) != revision:
            have = f"its latest revision is {revision}" if revision else "it has no revision yet"
            raise ConflictError(
                f"user {shown(entry.user)}: cannot commit on parent={entry.parent}, {have}; load that and train on "
                'it, or commit with parent="latest"'
            )
