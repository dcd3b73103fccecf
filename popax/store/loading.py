"""Loading revisions: from a user and a wish ("latest", "promoted", a tag, a number) to a manifest and a checked row."""

from collections.abc import Sequence

import numpy as np
import tensorstore as ts

from popax.errors import BaseMismatchError, CorruptRevisionError, RevisionNotFoundError
from popax.store.database import Database
from popax.store.manifest import Manifest, UserRecord
from popax.store.pointers import Which, resolve
from popax.store.reader import Request, each_user, finish_row, latest_manifest, read_manifests, read_users, start_row
from popax.store.records import shown
from popax.store.registry import CohortRegistry


class RevisionLoader:
    """Finds manifests and rows of many users in parallel."""

    def __init__(self, database: Database, registry: CohortRegistry):
        self._database, self._registry = database, registry

    def rows(
        self, requests: Sequence[tuple[str, Which]], base_digest: str | None = None
    ) -> list[tuple[Manifest, np.ndarray]]:
        """Each revision's manifest and row, uint8 [row_bytes]. A row's read begins as soon as its manifest is known.

        Raises RevisionNotFoundError, CorruptRevisionError, and BaseMismatchError where base_digest is given and one was
        made for another base.
        """
        begun: dict[int, tuple[Manifest, ts.Future]] = {}
        later: dict[int, tuple[UserRecord, int]] = {}
        records = each_user(self._database, None, [user for user, _ in requests])
        for index, ((user, which), record) in enumerate(zip(requests, records, strict=True)):
            if record is None:
                raise self.unknown(user)
            revision = resolve(record, which)
            if revision == record.latest:
                begun[index] = self._begin(self.latest(record), base_digest)
            else:
                later[index] = record, revision
        for index, manifest in zip(later, self.manifests(list(later.values())), strict=True):
            begun[index] = self._begin(manifest, base_digest)
        ordered = [begun[index] for index in range(len(requests))]
        return [(manifest, finish_row(self._database, manifest, row)) for manifest, row in ordered]

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

    def _begin(self, manifest: Manifest, base_digest: str | None) -> tuple[Manifest, ts.Future]:
        if base_digest is not None and manifest.base_digest != base_digest:
            raise BaseMismatchError(
                f"{manifest.shown} was made for the base {manifest.base_digest}, not for {base_digest}; load that "
                "base, or train the user on this one"
            )
        return manifest, start_row(self._database, manifest)

    def latest(self, record: UserRecord) -> Manifest:
        """The manifest inside the user's record."""
        manifest = latest_manifest(record, self._registry.known)
        assert manifest is not None  # `known` raises where there is no cohort
        return manifest
