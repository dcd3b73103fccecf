"""Committing revisions: rows, manifests and user pointers in one atomic transaction."""

import dataclasses
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import tensorstore as ts

import popax
from popax.errors import ConflictError
from popax.store.cohort import StoredCohort
from popax.store.database import Database, is_conflict, storage_error
from popax.store.layout import row_digest
from popax.store.manifest import Manifest, UserRecord, now
from popax.store.reader import read_manifests, read_users, stored_form
from popax.store.records import as_stored, manifest_key, next_row_key, row_key, seal, shown, unseal, user_key
from popax.types import AdapterState

# Writers of other users collide only in the allocation of rows; each round at least one of them gets through.
ATTEMPTS = 100
LONGEST_PAUSE_S = 0.1


@dataclasses.dataclass(frozen=True)
class Commit:
    """One user's new revision. parent: "latest" continues whatever is latest, a number must be the latest, None
    must be the user's first. run: see `Manifest.run`."""

    user: str
    adapter: AdapterState
    _: dataclasses.KW_ONLY
    parent: int | Literal["latest"] | None = "latest"
    metrics: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] | None = None
    hparams: Mapping[str, Any] | None = None
    run: str | None = None


def write(database: Database, cohort: StoredCohort, commits: Sequence[Commit]) -> list[Manifest]:
    """All of the commits in one transaction, or none; what the same run already committed is returned, not rewritten.

    Raises ConflictError where a parent is not the latest, another writer committed one of the users meanwhile, or a
    user appears twice; PopulationError where an adapter does not fit the cohort; StorageError where the store refuses.
    """
    _refuse_twice(commits)
    packed = [cohort.layout.pack(commit.adapter) for commit in commits]
    digests = [row_digest(row) for row in packed]
    latest: list[int] | None = None
    for attempt in range(ATTEMPTS):
        transaction = ts.Transaction(atomic=True, repeatable_read=True)
        try:
            users = read_users(database, transaction, [commit.user for commit in commits])
            current = [record.latest if record else 0 for record in users]
            _refuse_changed(commits, latest or current, current)
            latest = current
            kept = _already_committed(database, cohort, commits, digests, users)
            fresh = [index for index, manifest in enumerate(kept) if manifest is None]
            _refuse_other_parents([commits[index] for index in fresh], [current[index] for index in fresh])
            if not fresh:
                return [manifest for manifest in kept if manifest is not None]
            staged = [(commits[index], packed[index], digests[index], users[index]) for index in fresh]
            made = _stage(database, cohort, transaction, staged)
            transaction.commit_sync()
            return [manifest or made.pop(0) for manifest in kept]
        except (ValueError, OSError) as error:
            if not is_conflict(error):
                raise storage_error(database.place, error) from error
        finally:
            transaction.abort()  # no effect once committed
        time.sleep(random.uniform(0, min(LONGEST_PAUSE_S, 0.002 * 2 ** min(attempt, 10))))
    raise ConflictError(
        f"{len(commits)} commits to {database.place!r} lost to other writers {ATTEMPTS} times; "
        "commit larger batches from fewer writers"
    )


_Staged = tuple[Commit, np.ndarray, str, UserRecord | None]


def _stage(
    database: Database, cohort: StoredCohort, transaction: ts.Transaction, staged: list[_Staged]
) -> list[Manifest]:
    """Put the rows, manifests and pointers into the transaction."""
    store = database.kvstore.with_transaction(transaction)
    allocated = store.read(next_row_key(cohort.id)).result()
    start = unseal(allocated.value)["next"] if allocated.state == "value" else 0
    created = now()
    writes = [store.write(next_row_key(cohort.id), seal({"next": start + len(staged)}))]
    made = []
    for row_index, (commit, row, digest, record) in enumerate(staged, start):
        manifest = Manifest(
            user=commit.user,
            revision=(record.latest if record else 0) + 1,
            cohort=cohort.id,
            row=row_index,
            digest=digest,
            base_digest=cohort.base_digest,
            config=cohort.config_record,
            created=created,
            version=popax.__version__,
            parent=record.latest if record else None,
            run=commit.run,
            hparams=as_stored(commit.hparams),
            provenance=as_stored(commit.provenance),
            metrics=as_stored(commit.metrics),
        )
        promoted = record.promoted if record else None
        pointers = UserRecord(user=commit.user, latest=manifest.revision, promoted=promoted)
        writes.append(store.write(row_key(cohort.id, row_index), row.tobytes()))
        writes.append(store.write(manifest_key(commit.user, manifest.revision), seal(stored_form(manifest))))
        writes.append(store.write(user_key(commit.user), seal(pointers.to_dict())))
        made.append(manifest)
    for write_future in writes:
        write_future.result()
    return made


def _already_committed(
    database: Database,
    cohort: StoredCohort,
    commits: Sequence[Commit],
    digests: Sequence[str],
    users: Sequence[UserRecord | None],
) -> list[Manifest | None]:
    """The latest manifest of each user for whom it holds the same bytes of the same run."""
    asked = [
        index
        for index, (commit, record) in enumerate(zip(commits, users, strict=True))
        if commit.run is not None and record is not None
    ]
    found: list[Manifest | None] = [None] * len(commits)
    requests = [(users[index].user, users[index].latest) for index in asked]  # pyright: ignore[reportOptionalMemberAccess]
    cohorts = {cohort.id: cohort}
    for index, manifest in zip(asked, read_manifests(database, requests, cohorts.get), strict=True):
        same = manifest is not None and manifest.run == commits[index].run and manifest.digest == digests[index]
        found[index] = manifest if same else None
    return found


def _refuse_twice(commits: Sequence[Commit]) -> None:
    users = [commit.user for commit in commits]
    if len(set(users)) != len(users):
        twice = next(user for index, user in enumerate(users) if user in users[:index])
        raise ConflictError(f"user {shown(twice)} appears twice in one batch; commit the second revision in the next")


def _refuse_changed(commits: Sequence[Commit], before: Sequence[int], current: Sequence[int]) -> None:
    for commit, old, new in zip(commits, before, current, strict=True):
        if old != new:
            raise ConflictError(
                f"user {shown(commit.user)}: another writer committed revision {new} meanwhile, nothing of this commit "
                f"was written; load it and commit on top of it with parent={new}"
            )


def _refuse_other_parents(commits: Sequence[Commit], latest: Sequence[int]) -> None:
    for commit, revision in zip(commits, latest, strict=True):
        if commit.parent != "latest" and (commit.parent or 0) != revision:
            have = f"its latest revision is {revision}" if revision else "it has no revision yet"
            raise ConflictError(
                f"user {shown(commit.user)}: cannot commit on parent={commit.parent}, {have}; load that and train on "
                'it, or commit with parent="latest"'
            )
