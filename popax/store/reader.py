"""Reading users, manifests and rows, many in parallel, each checked against its digest."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from popax.errors import CatalogError, CorruptRevisionError
from popax.store.cohort import StoredCohort
from popax.store.database import Database, is_refused, storage_error, storage_errors
from popax.store.layout import row_digest
from popax.store.manifest import Manifest, UserRecord
from popax.store.records import BrokenRecordError, manifest_key, manifest_prefix, shown, unseal, user_key

# Kept once in the cohort's record, and put back when a manifest is read.
_OF_COHORT = ("config", "base_digest")
_IN_FLIGHT = 4096


def stored_form(manifest: Manifest) -> dict[str, Any]:
    """The manifest without what its cohort's record already holds: at a million users that is half of its bytes."""
    record = {name: value for name, value in manifest.to_dict().items() if name not in _OF_COHORT}
    if not manifest.shard:  # what one process writes is as it always was
        del record["shard"]
    return record


def read_users(database: Database, transaction: ts.Transaction | None, users: Sequence[str]) -> list[UserRecord | None]:
    """Each user's pointers, None for an unknown user. Raises CorruptRevisionError naming the user."""
    store = database.kvstore.with_transaction(transaction) if transaction else database.kvstore
    futures = [store.read(user_key(user)) for user in users]
    return [
        _unsealed(
            database, future, f"the record of user {shown(user)}", lambda record, user=user: _as_user(record, user)
        )
        for user, future in zip(users, futures, strict=True)
    ]


def read_manifests(
    database: Database, requests: Sequence[tuple[str, int]], cohort_of: Callable[[str], StoredCohort | None]
) -> list[Manifest | None]:
    """Each (user, revision)'s manifest, None where there is none or `cohort_of` returns none for its cohort.

    Raises CorruptRevisionError naming the user and the revision.
    """
    futures = [database.kvstore.read(manifest_key(user, revision)) for user, revision in requests]
    return [
        _unsealed(
            database,
            future,
            f"the manifest of {shown(user)}@{revision}",
            lambda record, user=user, revision=revision: _as_manifest(record, user, revision, cohort_of),
        )
        for (user, revision), future in zip(requests, futures, strict=True)
    ]


def read_rows(database: Database, rows: ts.TensorStore, manifests: Sequence[Manifest]) -> list[np.ndarray]:
    """The checked rows of manifests of one cohort and shard, uint8 [row_bytes] each.

    Raises CorruptRevisionError naming the user and the revision, StorageError where the store refuses.
    """
    try:
        if len(manifests) == 1:  # an integer index costs a fifth of an index array
            found = [rows[manifests[0].row].read().result()]
        else:
            found = list(rows[np.array([manifest.row for manifest in manifests])].read().result())
    except (ValueError, OSError) as error:
        if is_refused(error):
            raise storage_error(database.place, error) from error
        if len(manifests) == 1:
            raise _corrupt(f"the row of {manifests[0].shown}", error) from error
        # One of them is broken: the one that is read alone and fails names itself.
        return [read_rows(database, rows, [manifest])[0] for manifest in manifests]
    for manifest, row in zip(manifests, found, strict=True):
        if row_digest(row) != manifest.digest:
            raise _corrupt(f"the row of {manifest.shown}", f"row {manifest.row} does not have digest {manifest.digest}")
    return found


def revisions_of(database: Database, user: str) -> list[int]:
    """The numbers of the user's revisions, ascending."""
    prefix = manifest_prefix(user)
    with storage_errors(database.place):
        keys = database.kvstore.list(_prefixed(prefix)).result()
    return sorted(int(key.decode().removeprefix(prefix)) for key in keys)


def all_users(database: Database) -> Iterator[UserRecord]:
    """Every user's pointers, in the order of the ids' hashes. Raises CorruptRevisionError naming the key."""
    with storage_errors(database.place):
        keys = database.kvstore.list(_prefixed("user/")).result()
    for start in range(0, len(keys), _IN_FLIGHT):
        some = keys[start : start + _IN_FLIGHT]
        futures = [database.kvstore.read(key) for key in some]
        for key, future in zip(some, futures, strict=True):
            record = _unsealed(database, future, f"the user record {key.decode()!r}", UserRecord.from_dict)
            if record is not None:
                yield record


def _unsealed(database: Database, future: ts.Future, what: str, convert: Callable[[dict[str, Any]], Any]) -> Any:
    try:
        result = future.result()
        return convert(unseal(result.value)) if result.state == "value" else None
    except CatalogError:
        raise
    except (ValueError, OSError) as error:
        if not isinstance(error, BrokenRecordError) and is_refused(error):
            raise storage_error(database.place, error) from error
        raise _corrupt(what, error) from error


def _as_user(record: dict[str, Any], user: str) -> UserRecord:
    if record["user"] != user:
        raise BrokenRecordError(f"it is the record of user {shown(record['user'])}")
    return UserRecord.from_dict(record)


def _as_manifest(
    record: dict[str, Any], user: str, revision: int, cohort_of: Callable[[str], StoredCohort | None]
) -> Manifest | None:
    if (record["user"], record["revision"]) != (user, revision):
        raise BrokenRecordError(f"it is the manifest of {shown(record['user'])}@{record['revision']}")
    cohort = cohort_of(record["cohort"])
    if cohort is None:
        return None
    return Manifest.from_dict(record | {"config": cohort.config_record, "base_digest": cohort.base_digest})


def _corrupt(what: str, why: object) -> CorruptRevisionError:
    return CorruptRevisionError(f"{what} is corrupt: {why}; load an earlier revision, or restore the catalog's files")


def _prefixed(prefix: str) -> ts.KvStore.KeyRange:
    """All keys that start with the prefix, which ends in "/": "0" is the next character."""
    return ts.KvStore.KeyRange(prefix, f"{prefix[:-1]}0")
