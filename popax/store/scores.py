"""How a revision did on text that it was not trained on: kept beside it, and worth nothing for other bytes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import tensorstore as ts

from popax.errors import ConflictError, CorruptRevisionError
from popax.store import pointers
from popax.store.database import Database, storage_errors
from popax.store.manifest import Manifest, UserRecord
from popax.store.packed import seal_user
from popax.store.publishing import digest_at
from popax.store.reader import read_users
from popax.store.records import BrokenRecordError, scores_key, seal, shown, unseal, user_key
from popax.store.writer import retried


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Of one revision. Bits per byte: fewer are better.

    digest, base_digest: of the bytes that were scored, and of the base they were scored on. own, base: bits per byte of
    the user's held-out text with the adapter and without; target_bytes: how much text that was. retention,
    base_retention: the same on a text that the base knew, None where none was given. norm: of all weight updates
    together, over that of the weights they change (Frobenius). data, retention_data: where the texts come from, with
    their digests. created: UTC, ISO 8601. promoted: what the gate asked for when it let the revision pass.
    """

    digest: str
    base_digest: str
    own: float
    base: float
    target_bytes: int
    norm: float
    created: str
    version: str
    retention: float | None = None
    base_retention: float | None = None
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    retention_data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    promoted: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def gain(self) -> float:
        """Bits per byte that the adapter saves on the user's held-out text."""
        return self.base - self.own

    @property
    def retention_loss(self) -> float | None:
        """Bits per byte that it costs on the text that the base knew."""
        if self.retention is None or self.base_retention is None:
            return None
        return self.retention - self.base_retention

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def put_scores(database: Database, entries: Sequence[tuple[Manifest, Scores]]) -> None:
    """Keep the scores of these revisions, in one transaction; later ones replace earlier ones, but for what the gate
    asked for when it let the revision pass.

    Raises ConflictError where a revision is not there any more, or its bytes or base are not those that were scored.
    """

    def work(transaction: ts.Transaction) -> None:
        records = read_users(database, transaction, [manifest.user for manifest, _ in entries])
        for (manifest, scores), record in zip(entries, records, strict=True):
            if not _is_of(scores, manifest) or not _is_there(database, transaction, record, manifest):
                raise ConflictError(f"{manifest.shown} was deleted, or is not what was scored: score what is there")
        before = read_scores(database, [manifest for manifest, _ in entries], transaction)
        kept = [
            (manifest, scores if scores.promoted or old is None else dataclasses.replace(scores, promoted=old.promoted))
            for (manifest, scores), old in zip(entries, before, strict=True)
        ]
        _write(database, transaction, kept)

    retried(database, len(entries), work)


def promote_scored(database: Database, entries: Sequence[tuple[Manifest, Scores]]) -> list[bool]:
    """Make serving follow each of these revisions that is still there with the bytes that were scored, and keep its
    scores, which say what the gate asked for: all in one transaction. Returns which were still there."""

    def work(transaction: ts.Transaction) -> list[bool]:
        store = database.kvstore.with_transaction(transaction)
        users = list(dict.fromkeys(manifest.user for manifest, _ in entries))
        records = dict(zip(users, read_users(database, transaction, users), strict=True))
        there, moved = [], {}
        for manifest, scores in entries:
            record = moved.get(manifest.user, records[manifest.user])
            there.append(_is_of(scores, manifest) and _is_there(database, transaction, record, manifest))
            if there[-1] and record is not None:
                moved[manifest.user] = pointers.promoted(record, manifest.revision)
        _write(database, transaction, [entry for entry, kept in zip(entries, there, strict=True) if kept])
        for written in [store.write(user_key(user), seal_user(record.stored())) for user, record in moved.items()]:
            written.result()
        return there

    return retried(database, len(entries), work) if entries else []


def _is_of(scores: Scores, manifest: Manifest) -> bool:
    return (scores.digest, scores.base_digest) == (manifest.digest, manifest.base_digest)


def _is_there(database: Database, transaction: ts.Transaction, record: UserRecord | None, manifest: Manifest) -> bool:
    """Whether the user's revision is still the manifest's: who was deleted and came back begins at 1 again."""
    if record is None or not record.oldest <= manifest.revision <= record.latest:
        return False
    return digest_at(database, transaction, record, manifest.revision) == manifest.digest


def _write(database: Database, transaction: ts.Transaction, entries: Sequence[tuple[Manifest, Scores]]) -> None:
    store = database.kvstore.with_transaction(transaction)
    writes = [store.write(scores_key(one.user, one.revision), seal(scores.to_dict())) for one, scores in entries]
    for written in writes:
        written.result()


def read_scores(
    database: Database, manifests: Sequence[Manifest], transaction: ts.Transaction | None = None
) -> list[Scores | None]:
    """Each revision's scores; None where it has none, or those of other bytes. Raises CorruptRevisionError."""
    store = database.kvstore if transaction is None else database.kvstore.with_transaction(transaction)
    with storage_errors(database.place):
        reads = [store.read(scores_key(one.user, one.revision)) for one in manifests]
        found = [read.result() for read in reads]
    scores = []
    for manifest, one in zip(manifests, found, strict=True):
        try:
            kept = Scores(**unseal(one.value)) if one.state == "value" else None
        except BrokenRecordError as error:
            raise CorruptRevisionError(
                f"the scores of {shown(manifest.user)}@{manifest.revision} are corrupt: {error}; score it again"
            ) from error
        scores.append(kept if kept is not None and _is_of(kept, manifest) else None)
    return scores
