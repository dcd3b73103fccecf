"""The catalog: every user's revisions, in one database."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import tensorstore as ts

from popax.adapters.base import AdapterConfig, SiteSpec
from popax.errors import BaseMismatchError, CatalogError, CorruptRevisionError, RevisionNotFoundError
from popax.store.cohort import StoredCohort, cohort_id
from popax.store.commit import Commit, Revision
from popax.store.database import Database, storage_errors
from popax.store.layout import RowLayout
from popax.store.manifest import Manifest, UserRecord
from popax.store.reader import all_users, read_manifests, read_rows, read_users, revisions_of
from popax.store.records import shown
from popax.store.registry import CohortRegistry
from popax.store.writer import publish, stage, write
from popax.types import AdapterState

__all__ = ["Catalog", "Commit", "Revision"]

Loaded = tuple[AdapterState, Manifest]


class Catalog:
    """All revisions of all users. Reading never blocks writing; a revision is there as a whole or not at all.

    Safe to use from several threads and, opened by each, from several processes.
    """

    def __init__(self, database: Database, *, read_only: bool = False):
        self._database = database
        self._read_only = read_only
        self._registry = CohortRegistry(database)

    @classmethod
    def open(
        cls,
        place: str | os.PathLike,
        *,
        create: bool = False,
        read_only: bool = False,
        context: ts.Context | None = None,
    ) -> "Catalog":
        """Open the catalog in a directory or at a TensorStore URL; `create` makes one where there is none.

        A memory:// catalog lives in `context`. Raises CatalogError and StorageError as `Database.open` does.
        """
        if create and read_only:
            raise CatalogError(f"cannot create {os.fspath(place)!r} read-only; drop one of create and read_only")
        return cls(Database.open(place, create=create, context=context), read_only=read_only)

    def cohort(
        self,
        config: AdapterConfig,
        specs: Mapping[str, SiteSpec],
        base_digest: str,
        layout: RowLayout,
        shared: Mapping[str, Any] | None = None,
    ) -> StoredCohort:
        """Find or register the cohort of (config, base_digest, layout). Idempotent.

        layout: of one user's adapter. shared: the frozen arrays that its users share, stored once. Raises
        CatalogError where the cohort exists with other shared arrays (use `shared()`'s then), or where it does not
        and the catalog is read-only.
        """
        return self._registry.find_or_register(config, specs, base_digest, layout, shared, read_only=self._read_only)

    def find_cohort(self, config: AdapterConfig, base_digest: str, layout: RowLayout) -> StoredCohort | None:
        """The cohort of (config, base_digest, layout), None where it is not registered."""
        return self._registry.find(cohort_id(config, base_digest, layout))

    def cohort_of(self, manifest: Manifest) -> StoredCohort:
        """The cohort a revision belongs to."""
        return self._registry.known(manifest.cohort)

    def shared(self, cohort: StoredCohort) -> AdapterState:
        """The frozen arrays that all of the cohort's users share: {} where its method has none."""
        return self._registry.shared(cohort)

    def commit(
        self,
        cohort: StoredCohort,
        user: str,
        adapter: AdapterState,
        *,
        parent: int | Literal["latest"] | None = "latest",
        metrics: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        hparams: Mapping[str, Any] | None = None,
        run: str | None = None,
    ) -> Manifest:
        """One user's next revision: durable when this returns. Fields as in `Commit`, errors as `commit_batch`."""
        one = Commit(user, adapter, parent=parent, metrics=metrics, provenance=provenance, hparams=hparams, run=run)
        return self.commit_batch(cohort, [one])[0]

    def commit_batch(self, cohort: StoredCohort, commits: Sequence[Commit]) -> list[Manifest]:
        """All of these revisions in one transaction: durable, all of them, when this returns; else none is.

        A revision whose run and bytes equal those of the user's latest is not written again. Raises ConflictError
        where a parent is not the latest or another writer came first, PopulationError where an adapter does not fit
        the cohort, StorageError where the disk is full or the store refuses.
        """
        self._check_writable(cohort)
        return write(self._database, cohort, commits) if commits else []

    def stage_batch(self, cohort: StoredCohort, commits: Sequence[Commit], *, shard: int) -> list[Revision]:
        """Write these revisions' rows into a shard, without making them revisions: `publish` does, for many shards.

        One writer a shard. What is staged and never published is seen by nobody. Errors as `commit_batch`.
        """
        self._check_writable(cohort)
        if not commits:
            return []
        with storage_errors(self._database.place):
            self._database.create_rows(cohort.id, cohort.layout.row_bytes, shard)
        return stage(self._database, cohort, commits, shard)

    def publish(self, cohort: StoredCohort, staged: Sequence[Revision], *, shards: int) -> list[Manifest]:
        """Staged revisions of any of the first `shards` shards become the users' next ones, in one transaction.

        Errors as `commit_batch`.
        """
        self._check_writable(cohort)
        self._database.declare_shards(shards)
        return publish(self._database, cohort, staged) if staged else []

    def _check_writable(self, cohort: StoredCohort) -> None:
        if self._read_only:
            raise CatalogError(f"cannot commit: {self._database.place!r} was opened read-only")
        self._registry.known(cohort.id)

    def exists(self, user: str) -> bool:
        """Whether the user has a revision."""
        return read_users(self._database, None, [user])[0] is not None

    def load(self, user: str, revision: int | None = None, *, base_digest: str | None = None) -> Loaded:
        """One revision, the latest by default. Its leaves are NumPy [L, ...], views of the one row that was read.

        Raises RevisionNotFoundError; CorruptRevisionError where the bytes do not match their digest;
        BaseMismatchError where base_digest is given and the adapter was made for another base.
        """
        return self._load([(user, revision)], base_digest)[0]

    def load_batch(self, users: Sequence[str], *, base_digest: str | None = None) -> list[Loaded]:
        """The latest revision of each user, in their order, read in parallel. Errors as `load`."""
        return self._load([(user, None) for user in users], base_digest)

    def history(self, user: str) -> list[Manifest]:
        """The user's manifests, oldest first. Raises RevisionNotFoundError for an unknown user."""
        requests = [(user, revision) for revision in revisions_of(self._database, user)]
        if not requests:
            raise self._unknown(user)
        found = read_manifests(self._database, requests, self._registry.known)
        return [manifest for manifest in found if manifest is not None]

    def _load(self, requests: Sequence[tuple[str, int | None]], base_digest: str | None) -> list[Loaded]:
        manifests = self._manifests(requests)
        by_place: dict[tuple[str, int], list[int]] = {}
        for index, manifest in enumerate(manifests):
            if base_digest is not None and manifest.base_digest != base_digest:
                raise BaseMismatchError(
                    f"{manifest.shown} was made for the base {manifest.base_digest}, not for {base_digest}; load that "
                    "base, or train the user on this one"
                )
            by_place.setdefault((manifest.cohort, manifest.shard), []).append(index)
        adapters: dict[int, AdapterState] = {}
        for (name, shard), indices in by_place.items():
            cohort = self._registry.known(name)
            stored = self._registry.rows(cohort, shard)
            rows = read_rows(self._database, stored, [manifests[index] for index in indices])
            adapters |= {index: cohort.layout.unpack(row) for index, row in zip(indices, rows, strict=True)}
        return [(adapters[index], manifest) for index, manifest in enumerate(manifests)]

    def _manifests(self, requests: Sequence[tuple[str, int | None]]) -> list[Manifest]:
        users = read_users(self._database, None, [user for user, _ in requests])
        wanted = []
        for (user, revision), record in zip(requests, users, strict=True):
            if record is None:
                raise self._unknown(user)
            wanted.append((user, record.latest if revision is None else revision))
            if not 1 <= wanted[-1][1] <= record.latest:
                raise RevisionNotFoundError(
                    f"user {shown(user)} has revisions 1 to {record.latest}, there is no revision {revision}"
                )
        found = []
        manifests = read_manifests(self._database, wanted, self._registry.known)
        for (user, revision), manifest in zip(wanted, manifests, strict=True):
            if manifest is None:
                raise CorruptRevisionError(f"{shown(user)}@{revision} has lost its manifest; load another revision")
            found.append(manifest)
        return found

    def _unknown(self, user: str) -> RevisionNotFoundError:
        return RevisionNotFoundError(
            f"user {shown(user)} has no revision in {self._database.place!r}; train one, or check the id"
        )

    # The last method, because its name hides the built-in in the annotations of those below it.
    def list(self, prefix: str = "") -> Sequence[UserRecord]:
        """The users whose id starts with `prefix`, sorted by id."""
        found = (record for record in all_users(self._database) if record.user.startswith(prefix))
        return sorted(found, key=lambda record: record.user)
