"""How a revision did on text that it was not trained on: kept beside it, and worth nothing for other bytes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import tensorstore as ts

from popax.errors import ConflictError, CorruptRevisionError
from popax.store.database import Database, storage_errors
from popax.store.manifest import Manifest
from popax.store.reader import read_users
from popax.store.records import BrokenRecordError, scores_key, seal, shown, unseal
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
    """Keep the scores of these revisions, in one transaction; later ones replace earlier ones.

    Raises ConflictError where a revision is not there any more, or its bytes are not those that were scored.
    """

    def work(transaction: ts.Transaction) -> None:
        store = database.kvstore.with_transaction(transaction)
        records = read_users(database, transaction, [manifest.user for manifest, _ in entries])
        writes = []
        for (manifest, scores), record in zip(entries, records, strict=True):
            there = record is not None and record.oldest <= manifest.revision <= record.latest
            if not there or scores.digest != manifest.digest:
                raise ConflictError(f"{manifest.shown} was deleted, or is not what was scored: score what is there")
            writes.append(store.write(scores_key(manifest.user, manifest.revision), seal(scores.to_dict())))
        for written in writes:
            written.result()

    retried(database, len(entries), work)


def read_scores(database: Database, manifests: Sequence[Manifest]) -> list[Scores | None]:
    """Each revision's scores; None where it has none, or those of other bytes. Raises CorruptRevisionError."""
    with storage_errors(database.place):
        reads = [database.kvstore.read(scores_key(one.user, one.revision)) for one in manifests]
        found = [read.result() for read in reads]
    scores = []
    for manifest, one in zip(manifests, found, strict=True):
        try:
            kept = Scores(**unseal(one.value)) if one.state == "value" else None
        except BrokenRecordError as error:
            raise CorruptRevisionError(
                f"the scores of {shown(manifest.user)}@{manifest.revision} are corrupt: {error}; score it again"
            ) from error
        scores.append(kept if kept is not None and kept.digest == manifest.digest else None)
    return scores
