"""Loading revisions: from a user and a wish ("latest", "promoted", a tag, a number) to a manifest and a checked row."""

import concurrent.futures
import os
from collections.abc import Sequence

import numpy as np
import tensorstore as ts

from popax.errors import BaseMismatchError, CorruptRevisionError, PopulationError, RevisionNotFoundError
from popax.store.database import Database
from popax.store.layout import row_digest
from popax.store.manifest import Manifest, UserRecord
from popax.store.packed import StoredManifest
from popax.store.pointers import Which, resolve
from popax.store.reader import (
    Request,
    await_all,
    finish_row,
    finish_users,
    latest_manifest,
    read_manifests,
    read_users,
    start_latest_row,
    start_row,
    start_users,
)
from popax.store.records import shown
from popax.store.registry import CohortRegistry
from popax.store.signing import Trust

# From here on a batch's digests take longer than starting threads for them does.
_PARALLEL_BYTES = 8 << 20
_THREADS = min(8, os.cpu_count() or 1)
_PIECE = 256  # users of a stacked batch whose rows are asked for together


class RevisionLoader:
    """Finds manifests and rows of many users in parallel."""

    def __init__(self, database: Database, registry: CohortRegistry, trusted: Trust | None = None):
        self._database, self._registry, self._trusted = database, registry, trusted

    def resolve(self, requests: Sequence[tuple[str, Which]], base_digest: str | None = None) -> list[Manifest]:
        """The manifest of each revision.

        Raises RevisionNotFoundError, CorruptRevisionError, BaseMismatchError where base_digest is given and one was
        made for another base, and SignatureError where keys are trusted and one is not theirs.
        """
        return self._checked(self._wanted(requests), base_digest)

    def load(
        self, requests: Sequence[tuple[str, Which]], base_digest: str | None = None
    ) -> tuple[list[Manifest], list[np.ndarray]]:
        """`resolve`, and `rows` of what it gives: those of latest revisions are under way while manifests are made."""
        wanted = self._wanted(requests)
        begun = [start_latest_row(self._database, record) if at == record.latest else None for record, at in wanted]
        manifests = self._checked(wanted, base_digest)
        return manifests, self._rows(manifests, begun)

    def stacked(
        self, requests: Sequence[tuple[str, Which]], base_digest: str | None = None
    ) -> tuple[list[Manifest], np.ndarray]:
        """`load`, with the rows as one array [N, row_bytes]: latest revisions of one array in one read of it.

        Raises PopulationError where the users are none or of several cohorts.
        """
        store, users = self._database.kvstore, [user for user, _ in requests]
        reads, wanted, begun = start_users(store, users), [], []
        # Rows of the first users are under way while records of the later ones are unpacked.
        for at in range(0, len(requests), _PIECE):
            some = slice(at, at + _PIECE)
            part = self._resolved(requests[some], finish_users(self._database, store, users[some], reads[some]))
            places = _places(part)
            begun.append(None if places is None else self._start(*places))
            wanted += part
        manifests = self._checked(wanted, base_digest)
        cohorts = {manifest.cohort for manifest in manifests}
        if len(cohorts) != 1:
            raise PopulationError(f"{len(requests)} users of {len(cohorts)} cohorts do not stack: name users of one")
        return manifests, self._stack(manifests, begun)

    def _stack(self, manifests: Sequence[Manifest], begun: Sequence[ts.Future | None]) -> np.ndarray:
        pieces = []
        for at, future in enumerate(begun):
            own = manifests[at * _PIECE : (at + 1) * _PIECE]
            rows_NxB = None if future is None else self._arrived(own, future)
            pieces.append(np.stack(self.rows(own)) if rows_NxB is None else rows_NxB)
        return np.concatenate(pieces) if len(pieces) > 1 else pieces[0]

    def _start(self, array: str, shard: int, rows: list[int]) -> ts.Future | None:
        try:
            return self._database.rows(array, shard)[rows].read()
        except (ValueError, OSError):
            return None  # reading one by one tells what is wrong

    def _arrived(self, manifests: Sequence[Manifest], begun: ts.Future) -> np.ndarray | None:
        """None where a row is not that of its digest, or a file was removed meanwhile: read one by one, each is read
        again, and named where it is broken."""
        try:
            rows_NxB = begun.result()
        except (ValueError, OSError):
            return None
        right = lambda row, manifest: row_digest(row) == manifest.digest  # noqa: E731
        if rows_NxB.nbytes < _PARALLEL_BYTES:
            return rows_NxB if all(map(right, rows_NxB, manifests)) else None
        with concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="popax-digest") as threads:
            return rows_NxB if all(threads.map(right, rows_NxB, manifests)) else None

    def _wanted(self, requests: Sequence[tuple[str, Which]]) -> list[tuple[UserRecord, int]]:
        return self._resolved(requests, read_users(self._database, None, [user for user, _ in requests]))

    def _resolved(
        self, requests: Sequence[tuple[str, Which]], records: Sequence[UserRecord | None]
    ) -> list[tuple[UserRecord, int]]:
        wanted = []
        for (user, which), record in zip(requests, records, strict=True):
            if record is None:
                raise self.unknown(user)
            wanted.append((record, resolve(record, which)))
        return wanted

    def _checked(self, wanted: Sequence[tuple[UserRecord, int]], base_digest: str | None) -> list[Manifest]:
        manifests = self.manifests(wanted)
        _check_bases(manifests, base_digest)
        if self._trusted is not None:
            for manifest in manifests:
                self._trusted.check(manifest, self._registry.known(manifest.cohort))
        return manifests

    def rows(self, manifests: Sequence[Manifest]) -> list[np.ndarray]:
        """Each revision's row, uint8 [row_bytes], decoded where it is stored in fewer bits. Raises
        CorruptRevisionError."""
        return self._rows(manifests, [None] * len(manifests))

    def _rows(self, manifests: Sequence[Manifest], started: Sequence[ts.Future | None]) -> list[np.ndarray]:
        begun = [
            start_row(self._database, manifest) if future is None else future
            for manifest, future in zip(manifests, started, strict=True)
        ]
        if sum(self._row_bytes(manifest) for manifest in manifests) < _PARALLEL_BYTES:
            await_all(begun)
            return list(map(self._finish, manifests, begun))
        with concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="popax-digest") as threads:
            return list(threads.map(self._finish, manifests, begun))

    def manifests(self, wanted: Sequence[tuple[UserRecord, int]]) -> list[Manifest]:
        """The manifests of these revisions: each is in its user's record, or has been superseded."""
        older = [Request(record.user, revision) for record, revision in wanted if revision != record.latest]
        read = iter(read_manifests(self._database, older, self._registry.known))
        found = []
        for record, revision in wanted:
            manifest = self.latest(record) if revision == record.latest else next(read)
            if manifest is None:
                raise CorruptRevisionError(
                    f"{shown(record.user)}@{revision} has lost its manifest; load another revision"
                )
            found.append(manifest)
        return found

    def record(self, user: str) -> UserRecord:
        """The user's pointers. Raises RevisionNotFoundError for an unknown user."""
        record = read_users(self._database, None, [user])[0]
        if record is None:
            raise self.unknown(user)
        return record

    def unknown(self, user: str) -> RevisionNotFoundError:
        """The error for a user without a revision."""
        return RevisionNotFoundError(
            f"user {shown(user)} has no revision in {self._database.place!r}; train one, or check the id"
        )

    def latest(self, record: UserRecord) -> Manifest:
        """The manifest inside the user's record."""
        manifest = latest_manifest(record, self._registry.known)
        assert manifest is not None  # `known` raises where there is no cohort
        return manifest

    def _finish(self, manifest: Manifest, future: ts.Future) -> np.ndarray:
        stored = finish_row(self._database, manifest, future)
        if manifest.codec is None:
            return stored
        codec = self._registry.codec(manifest)
        assert codec is not None
        return codec.decode(self._registry.known(manifest.cohort).layout, stored)

    def _row_bytes(self, manifest: Manifest) -> int:
        return self._registry.known(manifest.cohort).layout.row_bytes


def _places(wanted: Sequence[tuple[UserRecord, int]]) -> tuple[str, int, list[int]] | None:
    """(array, shard, rows) of latest revisions that all lie in one array as they are; None where they do not."""
    rows, arrays = [], set()
    for record, revision in wanted:
        current = record.current
        if revision != record.latest or not isinstance(current, StoredManifest) or current.encoded:
            return None
        arrays.add((current.fixed["cohort"], current.fixed["shard"]))
        rows.append(current.fixed["row"])
    return (*arrays.pop(), rows) if len(arrays) == 1 else None


def _check_bases(manifests: Sequence[Manifest], base_digest: str | None) -> None:
    for manifest in manifests if base_digest is not None else ():
        if manifest.base_digest != base_digest:
            raise BaseMismatchError(
                f"{manifest.shown} was made for the base {manifest.base_digest}, not for {base_digest}; load that "
                "base, train the user on this one, or carry them over with popax migrate"
            )
