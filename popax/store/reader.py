"""Reading users, manifests and rows, many in parallel, each checked against its digest."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from popax.errors import CatalogError, CorruptRevisionError
from popax.store.codec import rows_label
from popax.store.cohort import StoredCohort
from popax.store.database import Database, is_gone, is_refused, storage_error, storage_errors
from popax.store.manifest import Manifest, UserRecord
from popax.store.packed import StoredManifest, unseal_user
from popax.store.records import BrokenRecordError, manifest_key, row_key, rows_array, shown, user_key

# Kept once in the cohort's record, and put back when a manifest is read.
_OF_COHORT = ("config", "base_digest")
_ABSENT = Manifest(
    user="", revision=0, cohort="", row=-1, digest="", base_digest="", config={}, created="", version=""
).to_dict()
# A whole catalog is read in parts, by the first digit of the ids' hashes, and so many keys of a part at a time: a
# million records need not fit in memory.
PARTS = tuple("0123456789abcdef")
AT_A_TIME = 4096
_READS_AGAIN = 3

Cohorts = Callable[[str], StoredCohort | None]


class Request(NamedTuple):
    """One revision to read: its user and number."""

    user: str
    revision: int


def stored_form(manifest: Manifest) -> dict[str, Any]:
    """The manifest without what its cohort's record holds and what says nothing: at a million users half of it."""
    record = manifest.to_dict()
    return {name: value for name, value in record.items() if name not in _OF_COHORT and value != _ABSENT[name]}


def read_users(database: Database, transaction: ts.Transaction | None, users: Sequence[str]) -> list[UserRecord | None]:
    """Each user's pointers and latest manifest, None for an unknown user. Raises CorruptRevisionError by name."""
    store = database.kvstore.with_transaction(transaction) if transaction else database.kvstore
    return finish_users(database, store, users, start_users(store, users))


def start_users(store: ts.KvStore, users: Sequence[str]) -> list[ts.Future]:
    """Begin to read users' records; `finish_users` waits for them, all at once or some after the others."""
    return [store.read(user_key(user)) for user in users]


def finish_users(
    database: Database, store: ts.KvStore, users: Sequence[str], begun: Sequence[ts.Future]
) -> list[UserRecord | None]:
    """As `read_users`, of what `start_users` began."""
    await_all(begun)
    found = []
    for user, future in zip(users, begun, strict=True):
        record = _unsealed(database, store, user_key(user), future, _of_user, user)
        if record is not None and record["user"] != user:
            raise _corrupt(f"the record of user {shown(user)}", f"it is the record of user {shown(record['user'])}")
        found.append(None if record is None else UserRecord.from_stored(record))
    return found


def latest_manifest(record: UserRecord, cohort_of: Cohorts) -> Manifest | None:
    """The manifest inside the user's record; None where `cohort_of` returns none for its cohort."""
    return _as_manifest(record.current, record.user, record.latest, cohort_of)


def read_manifests(
    database: Database,
    requests: Sequence[Request],
    cohort_of: Cohorts,
    transaction: ts.Transaction | None = None,
) -> list[Manifest | None]:
    """Each superseded revision's manifest, None where there is none or `cohort_of` returns none for its cohort.

    Raises CorruptRevisionError naming the user and the revision.
    """
    store = database.kvstore.with_transaction(transaction) if transaction else database.kvstore
    futures = [store.read(manifest_key(user, revision)) for user, revision in requests]
    found = []
    for (user, revision), future in zip(requests, futures, strict=True):
        record = _unsealed(database, store, manifest_key(user, revision), future, _of_revision, user, revision)
        if record is not None and record["user"] != user:
            named = f"{shown(record['user'])}@{record['manifest']['revision']}"
            raise _corrupt(_of_revision(user, revision), f"it is the manifest of {named}")
        found.append(None if record is None else _as_manifest(record["manifest"], user, revision, cohort_of))
    return found


def start_row(database: Database, manifest: Manifest) -> ts.Future:
    """Begin to read the revision's row; `finish_row` waits for it."""
    return database.shard(manifest.shard).read(row_key(manifest.array, manifest.row))


def start_latest_row(database: Database, record: UserRecord) -> ts.Future:
    """As `start_row`, of the latest revision, whose manifest need not have been made."""
    latest = record.current
    if isinstance(latest, StoredManifest) and not latest.encoded:
        fixed = latest.fixed
        return database.shard(fixed["shard"]).read(row_key(fixed["cohort"], fixed["row"]))
    array = rows_array(latest["cohort"], rows_label(latest.get("codec")))
    return database.shard(latest.get("shard", 0)).read(row_key(array, latest["row"]))


def settled(future: ts.Future, again: Callable[[], ts.Future]) -> ts.KvStore.ReadResult:
    """The result of the read that `future` began; begun `again`, from the version that is there now, where `gc` had
    removed a file since. Readers take no lock: this is all that it costs them."""
    for _ in range(_READS_AGAIN):
        try:
            return future.result()
        except ValueError as error:
            if not is_gone(error):
                raise
            future = again()
    return future.result()


def finish_row(database: Database, manifest: Manifest, future: ts.Future) -> np.ndarray:
    """The revision's row, uint8 [row_bytes]. Raises CorruptRevisionError where it is not that of its digest."""
    try:
        value = settled(future, lambda: start_row(database, manifest)).value
    except (ValueError, OSError) as error:
        if is_refused(error):
            raise storage_error(database.place, error) from error
        raise _corrupt(f"the row of {manifest.shown}", error) from error
    if hashlib.sha256(value).hexdigest() != manifest.digest:  # `row_digest` of it
        raise _corrupt(f"the row of {manifest.shown}", f"row {manifest.row} does not have digest {manifest.digest}")
    return np.frombuffer(value, np.uint8)


def await_all(futures: Sequence[ts.Future]) -> None:
    """Wait until most of them are done, without waking up for each; what failed is raised where its result is taken."""
    if futures:
        futures[-1].exception()


def keys_under(store: ts.KvStore, place: str, prefix: str) -> list[str]:
    """The keys that start with the prefix, in order."""
    with storage_errors(place):
        after = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        for _ in range(_READS_AGAIN):
            try:
                return _listed(store, prefix, after)
            except ValueError as error:
                if not is_gone(error):  # see `settled`
                    raise
        return _listed(store, prefix, after)


def _listed(store: ts.KvStore, prefix: str, after: str) -> list[str]:
    # The nodes of the tree are read side by side, and each gives its keys when it has come.
    return [key.decode() for key in sorted(store.list(ts.KvStore.KeyRange(prefix, after)).result())]


def part_keys(database: Database, kind: str, part: str) -> list[str]:
    """The keys of this kind (user/, manifest/, ...) whose hash lies in the part, in order."""
    return keys_under(database.kvstore, database.place, f"{kind}/{part}")


def all_users(database: Database) -> Iterator[UserRecord]:
    """Every user's record, in the order of the ids' hashes. Raises CorruptRevisionError naming the key."""
    for part in PARTS:
        for _, record in records_at(database, part_keys(database, "user", part)):
            if isinstance(record, CorruptRevisionError):
                raise record
            if record is not None:
                yield record


def records_at(
    database: Database, keys: Sequence[str]
) -> Iterator[tuple[str, UserRecord | CorruptRevisionError | None]]:
    """Each key with its record, None where it was deleted meanwhile, or what is wrong with it."""
    for some in chunks(keys):
        futures = [database.kvstore.read(key) for key in some]
        for key, future in zip(some, futures, strict=True):
            try:
                record = _unsealed(database, database.kvstore, key, future, "the user record {!r}".format, key)
                if record is not None and user_key(record["user"]) != key:
                    raise _corrupt(f"the user record {key!r}", f"it is the record of user {shown(record['user'])}")
                yield key, None if record is None else UserRecord.from_stored(record)
            except CorruptRevisionError as error:
                yield key, error


def chunks(keys: Sequence[str], size: int = AT_A_TIME) -> Iterable[Sequence[str]]:
    """The keys, so many at a time."""
    return (keys[start : start + size] for start in range(0, len(keys), size))


def _unsealed(
    database: Database, store: ts.KvStore, key: str, future: ts.Future, what: Callable[..., str], *named: Any
) -> dict[str, Any] | None:
    """The record, None where there is none; what(*named): how an error calls it."""
    try:
        result = settled(future, lambda: store.read(key))
        return unseal_user(result.value) if result.state == "value" else None
    except CatalogError:
        raise
    except (ValueError, OSError) as error:
        if not isinstance(error, BrokenRecordError) and is_refused(error):
            raise storage_error(database.place, error) from error
        raise _corrupt(what(*named), error) from error


def _as_manifest(record: Mapping[str, Any], user: str, revision: int, cohort_of: Cohorts) -> Manifest | None:
    if record["revision"] != revision:
        raise _corrupt(_of_revision(user, revision), f"it is the manifest of revision {record['revision']}")
    cohort = cohort_of(record["cohort"])
    return None if cohort is None else Manifest.from_stored(user, record, cohort)


def _of_user(user: str) -> str:
    return f"the record of user {shown(user)}"


def _of_revision(user: str, revision: int) -> str:
    return f"the manifest of {shown(user)}@{revision}"


def _corrupt(what: str, why: object) -> CorruptRevisionError:
    return CorruptRevisionError(f"{what} is corrupt: {why}; load an earlier revision, or restore the catalog's files")
