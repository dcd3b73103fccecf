"""Removing a user, or a user's old revisions, and saying what else was derived from them."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import tensorstore as ts

from popax.errors import CatalogError, CorruptRevisionError, RevisionNotFoundError
from popax.store.bases import Fitted
from popax.store.codec import rows_label
from popax.store.database import Database, storage_errors
from popax.store.manifest import UserRecord
from popax.store.packed import seal_user, unseal_user
from popax.store.reader import keys_under, read_users
from popax.store.records import (
    BrokenRecordError,
    derived_key,
    derived_prefix,
    manifest_key,
    manifest_prefix,
    optimizer_array,
    row_key,
    rows_array,
    scores_prefix,
    shown,
    unseal,
    user_key,
)
from popax.store.writer import retried


class Derived(NamedTuple):
    """A revision that was merged, composed, distilled or migrated from revision `of` of `parent`."""

    user: str
    revision: int
    parent: str
    of: int


class Deletion(NamedTuple):
    """What was removed, and what it taints: revisions of others that hold something of it, and bases that were fitted
    on it among others (`UserFilter.basis` finds who is written in them). All of these are still there."""

    user: str
    revisions: int
    tainted: tuple[Derived, ...] = ()
    bases: tuple[Fitted, ...] = ()


class _Row(NamedTuple):
    shard: int
    key: str


def delete(database: Database, user: str) -> Deletion:
    """Remove the user's record, manifests, rows, scores and optimizer states, in one transaction.

    Raises RevisionNotFoundError for an unknown user, ConflictError where a revision is committed meanwhile.
    """

    def work(transaction: ts.Transaction) -> tuple[Deletion, list[_Row]]:
        record = _known(database, transaction, user)
        records = _manifests(database, transaction, record)
        rows = _rows(records.values())
        keys = [user_key(user), *(key for prefix in _prefixes(user) for key in _keys(database, prefix))]
        keys += [derived_key(parent, user, at) for at, one in records.items() for parent in _parents(one)]
        _erase(database, transaction, keys, rows)
        return Deletion(user, len(records)), rows

    done, rows = retried(database, 1, work)
    _erase_in_other_shards(database, rows)
    return done._replace(tainted=tuple(one for one in tainted(database, user) if one.user != user))


def prune(database: Database, user: str, before: int) -> list[int]:
    """Remove the user's revisions below `before`, in one transaction; returns their numbers.

    Raises CatalogError where one of them is the latest, promoted or tagged, RevisionNotFoundError for an unknown user.
    """

    def work(transaction: ts.Transaction) -> tuple[list[int], list[_Row]]:
        record = _known(database, transaction, user)
        held = {record.latest: "the latest", **({record.promoted: "promoted"} if record.promoted else {})}
        held |= {at: f"tagged {name!r}" for name, at in record.tags.items()}
        for at, why in sorted(held.items()):
            if at < before:
                raise CatalogError(f"cannot prune {shown(user)} below {before}: revision {at} is {why}")
        gone = list(range(record.oldest, before))
        records = _manifests(database, transaction, record, gone)
        keys = [manifest_key(user, at) for at in gone]
        keys += [derived_key(parent, user, at) for at, one in records.items() for parent in _parents(one)]
        keys += [
            key for prefix in _prefixes(user)[1:] for key in _keys(database, prefix) if int(key[len(prefix) :]) < before
        ]
        rows = _rows(records.values())
        _erase(database, transaction, keys, rows)
        kept = tuple(at for at in record.promotions if at >= before)
        changed = dataclasses.replace(record, oldest=max(record.oldest, before), promotions=kept)
        database.kvstore.with_transaction(transaction).write(user_key(user), seal_user(changed.stored())).result()
        return gone, rows

    gone, rows = retried(database, 1, work)
    _erase_in_other_shards(database, rows)
    return gone


def tainted(database: Database, user: str) -> list[Derived]:
    """The revisions that were derived from the user's and are still there, also after the user is deleted."""
    keys = keys_under(database.kvstore, database.place, derived_prefix(user))
    with storage_errors(database.place):
        read = [database.kvstore.read(key) for key in keys]
        found = [future.result() for future in read]
    try:
        return sorted(Derived(**unseal(one.value)) for one in found if one.state == "value")
    except BrokenRecordError as error:
        raise CorruptRevisionError(
            f"the index of what was derived from user {shown(user)} is corrupt: {error}"
        ) from error


def _known(database: Database, transaction: ts.Transaction, user: str) -> UserRecord:
    record = read_users(database, transaction, [user])[0]
    if record is None:
        raise RevisionNotFoundError(f"user {shown(user)} has no revision in {database.place!r}; check the id")
    return record


def _prefixes(user: str) -> tuple[str, ...]:
    return manifest_prefix(user), scores_prefix(user)


def _keys(database: Database, prefix: str) -> list[str]:
    # Not of the transaction: a key added meanwhile comes with a change of the user's record, which was read in it.
    return keys_under(database.kvstore, database.place, prefix)


def _manifests(
    database: Database, transaction: ts.Transaction, record: UserRecord, wanted: Sequence[int] | None = None
) -> dict[int, dict]:
    """The stored manifests of these revisions (default: all). A broken one is left out: nothing keeps it from deletion,
    and its row is found by `gc` as one that nothing names."""
    store = database.kvstore.with_transaction(transaction)
    asked = range(record.oldest, record.latest + 1) if wanted is None else wanted
    found: dict[int, dict] = {}
    for at in asked:
        if at == record.latest:
            found[at] = dict(record.current)
            continue
        read = store.read(manifest_key(record.user, at)).result()
        try:
            found[at] = dict(unseal_user(read.value)["manifest"])
        except BrokenRecordError:
            continue
    return found


def _rows(manifests) -> list[_Row]:
    def array(one: dict) -> str:
        return rows_array(one["cohort"], rows_label(one.get("codec")))

    found = []
    for one in manifests:
        found.append(_Row(one.get("shard", 0), row_key(array(one), one["row"])))
        if kept := one.get("optimizer"):
            state = row_key(optimizer_array(one["cohort"], kept["layout"]), kept["row"])
            found.append(_Row(one.get("shard", 0), state))
    return found


def _parents(manifest: dict) -> list[str]:
    return [user for user, _, _ in manifest.get("derived_from", ())]


def _erase(database: Database, transaction: ts.Transaction, keys: Sequence[str], rows: Sequence[_Row]) -> None:
    store = database.kvstore.with_transaction(transaction)
    gone = [*keys, *(row.key for row in rows if row.shard == 0)]
    for erased in [store.write(key, None) for key in gone]:
        erased.result()


def _erase_in_other_shards(database: Database, rows: Sequence[_Row]) -> None:
    """Other shards are databases of their own: their rows go once nothing names them. Killed before that, they are rows
    that nothing names, which `verify` counts and `gc` removes."""
    if not any(row.shard for row in rows):
        return
    with storage_errors(database.place), database.writing():
        for erased in [database.shard(row.shard).write(row.key, None) for row in rows if row.shard]:
            erased.result()
