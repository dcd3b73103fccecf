"""A user's pointers: which revision is meant; tags, promotion and rollback, each one atomic change of one record."""

import dataclasses
import re
from collections.abc import Callable, Mapping

import tensorstore as ts

from popax.errors import CatalogError, ConflictError, RevisionNotFoundError
from popax.store.database import Database
from popax.store.manifest import PROMOTIONS, UserRecord
from popax.store.packed import seal_user
from popax.store.reader import read_users
from popax.store.records import shown, user_key
from popax.store.writer import retried

# A number, "latest", "promoted" or a tag; None is the latest.
Which = int | str | None

LATEST, PROMOTED = "latest", "promoted"
RESERVED = (LATEST, PROMOTED, "base", "candidate")
TAG = re.compile(r"(?=.*[A-Za-z_])[A-Za-z0-9_.-]{1,64}")


def resolve(record: UserRecord, which: Which) -> int:
    """The revision's number. Raises RevisionNotFoundError where the user has no such revision, promotion or tag."""
    if which is None or which == LATEST:
        return record.latest
    if which == PROMOTED:
        if record.promoted is None:
            raise RevisionNotFoundError(
                f"user {shown(record.user)} has no promoted revision; promote one, or ask for {LATEST!r}"
            )
        return record.promoted
    if isinstance(which, str):
        if which not in record.tags:
            tags = ", ".join(map(repr, sorted(record.tags))) or "none"
            raise RevisionNotFoundError(f"user {shown(record.user)} has no tag {shown(which)}; its tags: {tags}")
        return record.tags[which]
    if not record.oldest <= which <= record.latest:
        raise RevisionNotFoundError(
            f"user {shown(record.user)} has revisions {record.oldest} to {record.latest}, there is no revision {which}"
        )
    return which


def tag(database: Database, user: str, name: str, which: Which) -> UserRecord:
    """Give a revision a name, or move the name to it. Raises CatalogError on a name that could be mistaken."""
    if not TAG.fullmatch(name) or name in RESERVED:
        raise CatalogError(
            f"tag {shown(name)}: 1 to 64 letters, digits, '_', '.' or '-', not digits alone, and not one of "
            + ", ".join(RESERVED)
        )
    return _changed(database, user, lambda record: {"tags": {**record.tags, name: resolve(record, which)}})


def untag(database: Database, user: str, name: str) -> UserRecord:
    """Take a name away. Raises RevisionNotFoundError where the user has no such tag."""

    def change(record: UserRecord) -> Mapping[str, object]:
        resolve(record, name if name not in RESERVED else f"{name} (reserved)")
        return {"tags": {other: at for other, at in record.tags.items() if other != name}}

    return _changed(database, user, change)


def promote(database: Database, user: str, which: Which, *, expected: int | None = None) -> UserRecord:
    """Make serving follow this revision. expected: the latest revision that the decision was made on, if it matters.

    Raises RevisionNotFoundError; ConflictError where `expected` is not the latest any more.
    """

    def change(record: UserRecord) -> Mapping[str, object]:
        if expected is not None and expected != record.latest:
            raise ConflictError(
                f"user {shown(user)}: revision {record.latest} was committed since {expected} was looked at; look at "
                "it and promote again"
            )
        return {"promotions": promoted(record, resolve(record, which)).promotions}

    return _changed(database, user, change)


def promoted(record: UserRecord, revision: int) -> UserRecord:
    """The record with this revision as the one that serving follows."""
    if revision == record.promoted:
        return record
    return dataclasses.replace(record, promotions=(*record.promotions, revision)[-PROMOTIONS:])


def rollback(database: Database, user: str, which: Which = None) -> UserRecord:
    """Make serving follow an earlier promoted revision again: the one before, or one of those it has followed.

    Only what was promoted once can be rolled back to, so that no way leads around the gate.
    """

    def change(record: UserRecord) -> Mapping[str, object]:
        earlier = record.promotions[:-1]
        if not earlier:
            raise RevisionNotFoundError(
                f"user {shown(user)} has no earlier promotion to roll back to (promotions: {list(record.promotions)})"
            )
        wanted = earlier[-1] if which is None else resolve(record, which)
        if wanted not in earlier:
            raise RevisionNotFoundError(
                f"user {shown(user)}: revision {wanted} was not promoted before {record.promoted} (promotions: "
                f"{list(record.promotions)}); promote it instead"
            )
        last = len(earlier) - earlier[::-1].index(wanted)
        return {"promotions": earlier[:last]}

    return _changed(database, user, change)


def _changed(database: Database, user: str, change: Callable[[UserRecord], Mapping[str, object]]) -> UserRecord:
    """The user's record with what `change` returns replaced; durable when this returns."""

    def work(transaction: ts.Transaction) -> UserRecord:
        record = read_users(database, transaction, [user])[0]
        if record is None:
            raise RevisionNotFoundError(
                f"user {shown(user)} has no revision in {database.place!r}; train one, or check the id"
            )
        changed = dataclasses.replace(record, **change(record))  # pyright: ignore[reportArgumentType]
        if changed != record:
            store = database.kvstore.with_transaction(transaction)
            store.write(user_key(user), seal_user(changed.stored())).result()
        return changed

    return retried(database, 1, work)
