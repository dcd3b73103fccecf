"""Committing revisions: rows, manifests and user pointers in one atomic transaction."""

import random
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import tensorstore as ts

from popax.errors import ConflictError, CorruptRevisionError
from popax.store.codec import as_codec, rows_label
from popax.store.cohort import StoredCohort
from popax.store.commit import Commit, Revision
from popax.store.database import Database, is_conflict, is_gone, storage_error, storage_errors
from popax.store.finite import refuse_nan, refuse_non_finite
from popax.store.layout import row_digest
from popax.store.manifest import Manifest, UserRecord, now
from popax.store.optimizer import PackedOptimizer, pack_optimizer, put_layouts
from popax.store.publishing import digests_of, new_manifest, put_manifests
from popax.store.reader import latest_manifest, read_users
from popax.store.records import next_row_key, optimizer_array, row_key, rows_array, seal, shown, unseal
from popax.store.signing import Signer

T = TypeVar("T")

# Writers of other users collide only in the allocation of rows; each round at least one of them gets through.
ATTEMPTS = 100
LONGEST_PAUSE_S = 0.1


class Packed(NamedTuple):
    """The bytes of a commit, as they are stored."""

    row: np.ndarray
    optimizer: PackedOptimizer | None


def write(
    database: Database, cohort: StoredCohort, commits: Sequence[Commit], signer: Signer | None = None
) -> list[Manifest]:
    """All of the commits in one transaction, or none; what the same run already committed is returned, not rewritten.

    Raises ConflictError where a parent is not the latest, another writer committed one of the users meanwhile, or a
    user appears twice; PopulationError where an adapter does not fit the cohort; NonFiniteError where some hold what is
    not a finite number; StorageError where the store refuses.
    """
    packed, entries = _packed(cohort, commits)
    _create_arrays(database, cohort, commits)

    def place(store: ts.KvStore, fresh: Sequence[int]) -> list[Revision]:
        return place_rows(store, cohort, packed, entries, fresh, shard=0)

    return _write(database, cohort, entries, place, signer)


def _create_arrays(database: Database, cohort: StoredCohort, commits: Sequence[Commit], shard: int = 0) -> None:
    """Of the codecs that these commits name: their rows are of other lengths."""
    named = [as_codec(commit.codec) for commit in commits if commit.codec is not None]
    for codec in {codec.label: codec for codec in named}.values():
        with storage_errors(database.place):
            database.create_rows(rows_array(cohort.id, codec.label), codec.stored_bytes(cohort.layout), shard)


def stage(database: Database, cohort: StoredCohort, commits: Sequence[Commit], shard: int) -> list[Revision]:
    """Write the rows into a shard of their own, where nobody sees them before `publish`. Durable when this returns.

    What the same run already committed is left out. Errors as `write`, but for conflicts between users' revisions.
    """
    packed, entries = _packed(cohort, commits)
    _create_arrays(database, cohort, commits, shard)
    users = read_users(database, None, [entry.user for entry in entries])
    kept = _already_committed(cohort, entries, users)
    fresh = [index for index, manifest in enumerate(kept) if manifest is None]
    if not fresh:
        return []

    def rows(transaction: ts.Transaction) -> list[Revision]:
        store = database.shard(shard).with_transaction(transaction)
        return place_rows(store, cohort, packed, entries, fresh, shard)

    return retried(database, len(fresh), rows)


def publish(
    database: Database, cohort: StoredCohort, staged: Sequence[Revision], signer: Signer | None = None
) -> list[Manifest]:
    """The manifests and pointers of staged revisions, of all shards, in one transaction: all are visible, or none."""
    return _write(database, cohort, staged, lambda store, fresh: [staged[index] for index in fresh], signer)


def _write(
    database: Database,
    cohort: StoredCohort,
    entries: Sequence[Revision],
    place: Callable[[ts.KvStore, Sequence[int]], list[Revision]],
    signer: Signer | None = None,
) -> list[Manifest]:
    """place(store in the transaction, indices of the entries to write): these entries, with the rows they have."""
    _refuse_twice(entries)
    before: list[int] = []

    def work(transaction: ts.Transaction) -> list[Manifest]:
        users = read_users(database, transaction, [entry.user for entry in entries])
        current = [record.latest if record else 0 for record in users]
        _refuse_changed(entries, before or current, current)
        before[:] = current
        kept = _already_committed(cohort, entries, users)
        fresh = [index for index, manifest in enumerate(kept) if manifest is None]
        _refuse_other_parents([entries[index] for index in fresh], [current[index] for index in fresh])
        if not fresh:
            return [manifest for manifest in kept if manifest is not None]
        store = database.kvstore.with_transaction(transaction)
        placed = place(store, fresh)
        parents, created = digests_of(database, transaction, placed), now()
        made = [
            new_manifest(cohort, revision, users[index], created, parents, signer)
            for revision, index in zip(placed, fresh, strict=True)
        ]
        put_manifests(store, [(one, users[index]) for one, index in zip(made, fresh, strict=True)])
        written = iter(made)
        return [manifest or next(written) for manifest in kept]

    return retried(database, len(entries), work)


def retried(database: Database, count: int, work: Callable[[ts.Transaction], T]) -> T:
    """work(transaction), committed; again where another writer changed what it had read."""
    for attempt in range(ATTEMPTS):
        transaction = ts.Transaction(atomic=True, repeatable_read=True)
        try:
            with database.locks.writing():
                made = work(transaction)
                with database.committing():
                    transaction.commit_sync()
            return made
        except (ValueError, OSError) as error:
            if not is_conflict(error):
                raise storage_error(database.place, error) from error
        except CorruptRevisionError as error:
            if attempt or error.__cause__ is None or not is_gone(error.__cause__):
                raise  # else gc has removed a file since the transaction began
        finally:
            transaction.abort()  # no effect once committed
        time.sleep(random.uniform(0, min(LONGEST_PAUSE_S, 0.002 * 2 ** min(attempt, 10))))
    raise ConflictError(
        f"{count} commits to {database.place!r} lost to other writers {ATTEMPTS} times; "
        "commit larger batches from fewer writers"
    )


def place_rows(
    store: ts.KvStore,
    cohort: StoredCohort,
    packed: Sequence[Packed],
    entries: Sequence[Revision],
    fresh: Sequence[int],
    shard: int,
) -> list[Revision]:
    """Put the rows of these entries, each into the array of its codec, and what their optimizers keep; returns the
    entries with their places."""
    rows: dict[str, list[int]] = {}
    beside: dict[str, list[int]] = {}
    for index in fresh:
        optimizer = packed[index].optimizer
        rows.setdefault(rows_array(cohort.id, rows_label(entries[index].codec)), []).append(index)
        if optimizer is not None:
            beside.setdefault(optimizer_array(cohort.id, optimizer.record["layout"]), []).append(index)
    places = _write_arrays(store, rows, {index: packed[index].row for index in fresh})
    states = {index: one for index in fresh if (one := packed[index].optimizer) is not None}
    put_layouts(store, list(states.values()))
    state_places = _write_arrays(store, beside, {index: one.row for index, one in states.items()})
    kept = {index: {**one.record, "row": state_places[index]} for index, one in states.items()}
    return [entries[index].placed(places[index], shard, kept.get(index)) for index in fresh]


def _write_arrays(store: ts.KvStore, arrays: dict[str, list[int]], rows: dict[int, np.ndarray]) -> dict[int, int]:
    """arrays: whose rows each array takes. Returns the place of each."""
    places: dict[int, int] = {}
    for array, members in arrays.items():
        start = write_rows(store, array, [rows[index] for index in members])
        places |= {index: row for row, index in enumerate(members, start)}
    return places


def write_rows(store: ts.KvStore, array: str, rows: Sequence[np.ndarray]) -> int:
    """Put the rows and the next free index into the store's transaction; returns the first row's index."""
    allocated = store.read(next_row_key(array)).result()
    start = unseal(allocated.value)["next"] if allocated.state == "value" else 0
    writes = [store.write(next_row_key(array), seal({"next": start + len(rows)}))]
    writes += [store.write(row_key(array, index), row.tobytes()) for index, row in enumerate(rows, start)]
    for write_future in writes:
        write_future.result()
    return start


def _packed(cohort: StoredCohort, commits: Sequence[Commit]) -> tuple[list[Packed], list[Revision]]:
    """The bytes as they are stored, and what else the commits say. Raises NonFiniteError as `write`."""
    rows = [cohort.layout.checked(commit.adapter) for commit in commits]
    refuse_non_finite(cohort.layout, [commit.user for commit in commits], rows)
    stored, entries = [], []
    for commit, own in zip(commits, rows, strict=True):
        row, codec = own, None
        if commit.codec is not None:
            form = as_codec(commit.codec)
            encoded = form.encode(cohort.layout, row)
            decoded = form.decode(cohort.layout, encoded)
            refuse_non_finite(cohort.layout, [commit.user], [decoded], f" once stored as {form.label}")
            row, codec = encoded, {**form.record, "error": form.error(cohort.layout, row, decoded)}
        optimizer = None
        if commit.optimizer is not None:
            refuse_nan(commit.optimizer, commit.user)
            optimizer = pack_optimizer(commit.optimizer)
        stored.append(Packed(row, optimizer))
        entries.append(Revision.of(commit, row_digest(row), codec))
    return stored, entries


def _already_committed(
    cohort: StoredCohort, entries: Sequence[Revision], users: Sequence[UserRecord | None]
) -> list[Manifest | None]:
    """The latest manifest of each user for whom it holds the same bytes of the same run."""

    def kept(entry: Revision, record: UserRecord | None) -> Manifest | None:
        if record is None or entry.run is None or record.current.get("run") != entry.run:
            return None
        same = (record.current["cohort"], record.current["digest"]) == (cohort.id, entry.digest)
        return latest_manifest(record, {cohort.id: cohort}.get) if same else None

    return [kept(entry, record) for entry, record in zip(entries, users, strict=True)]


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
