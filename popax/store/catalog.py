"""The catalog: every user's revisions, in one database."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import tensorstore as ts

from popax.adapters.base import AdapterConfig, SiteSpec
from popax.errors import CatalogError
from popax.store import deletion, pointers
from popax.store.bases import BasisShelf
from popax.store.codec import RowCodec
from popax.store.cohort import StoredCohort, cohort_id
from popax.store.commit import Commit, CommitFields, Revision
from popax.store.database import Database, storage_errors
from popax.store.deletion import Deletion, Derived
from popax.store.filters import UserFilter
from popax.store.gc import GRACE_S, Collected, collect
from popax.store.layout import RowLayout
from popax.store.listing import Page, matching, page
from popax.store.loading import RevisionLoader
from popax.store.manifest import Manifest, UserRecord
from popax.store.optimizer import read_optimizer
from popax.store.pointers import Which
from popax.store.reader import read_users
from popax.store.registry import CohortRegistry
from popax.store.scores import Scores, promote_scored, put_scores, read_scores
from popax.store.signing import Signer, Trust
from popax.store.verify import Audit, verify
from popax.store.writer import publish, stage, write
from popax.types import AdapterState

__all__ = ["Catalog", "Commit", "Revision"]

Loaded = tuple[AdapterState, Manifest]
EVERYONE = UserFilter()


class Catalog:
    """All revisions of all users. Reading never blocks writing; a revision is there as a whole or not at all.

    Safe to use from several threads and, opened by each, from several processes.
    """

    def __init__(
        self, database: Database, *, read_only: bool = False, signer: Signer | None = None, trusted: Trust | None = None
    ):
        self._database, self._read_only, self._signer, self._trusted = database, read_only, signer, trusted
        self._registry = CohortRegistry(database)
        self._loader = RevisionLoader(database, self._registry, trusted)

    @classmethod
    def open(
        cls,
        place: str | os.PathLike,
        *,
        create: bool = False,
        read_only: bool = False,
        context: ts.Context | None = None,
        signer: Signer | None = None,
        trusted: Trust | None = None,
    ) -> "Catalog":
        """Open the catalog in a directory or at a TensorStore URL; `create` makes one where there is none.

        A memory:// catalog lives in `context`. signer: of what is committed. trusted: what is loaded must be signed by
        one of these keys. Raises CatalogError and StorageError as `Database.open` does.
        """
        if create and read_only:
            raise CatalogError(f"cannot create {os.fspath(place)!r} read-only; drop one of create and read_only")
        database = Database.open(place, create=create, context=context)
        return cls(database, read_only=read_only, signer=signer, trusted=trusted)

    @property
    def place(self) -> str:
        """The directory or URL that it was opened at."""
        return self._database.place

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

    def cohorts(self) -> Sequence[StoredCohort]:
        """All cohorts that were registered, of any base."""
        return self._registry.all()

    def cohort_of(self, manifest: Manifest) -> StoredCohort:
        """The cohort a revision belongs to."""
        return self._registry.known(manifest.cohort)

    def shared(self, cohort: StoredCohort) -> AdapterState:
        """The frozen arrays that all of the cohort's users share: {} where its method has none."""
        return self._registry.shared(cohort)

    def codec_of(self, manifest: Manifest) -> RowCodec | None:
        """How a revision's row is stored, None where as it is."""
        return self._registry.codec(manifest)

    @property
    def bases(self) -> BasisShelf:
        """What clusters of users share, for rows that are stored as coefficients (`basis.BasisCodec`)."""
        return self._registry.bases

    def commit(
        self, cohort: StoredCohort, user: str, adapter: AdapterState, **fields: Unpack[CommitFields]
    ) -> Manifest:
        """One user's next revision: durable when this returns. Fields as in `Commit`, errors as `commit_batch`."""
        return self.commit_batch(cohort, [Commit(user, adapter, **fields)])[0]

    def commit_batch(self, cohort: StoredCohort, commits: Sequence[Commit]) -> list[Manifest]:
        """All of these revisions in one transaction: durable, all of them, when this returns; else none is.

        A revision whose run and bytes equal those of the user's latest is not written again. Raises ConflictError
        where a parent is not the latest or another writer came first, PopulationError where an adapter does not fit
        the cohort, RevisionNotFoundError where one is derived from what is not there, StorageError where the disk is
        full or the store refuses.
        """
        self._check_writable(cohort)
        return write(self._database, cohort, commits, self._signer) if commits else []

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
        return publish(self._database, cohort, staged, self._signer) if staged else []

    def _check_writable(self, cohort: StoredCohort) -> None:
        self._writable("commit")
        self._registry.known(cohort.id)

    def exists(self, user: str) -> bool:
        """Whether the user has a revision."""
        return self.records([user])[0] is not None

    def records(self, users: Sequence[str]) -> list[UserRecord | None]:
        """Each user's pointers, read in parallel; None for an unknown user."""
        return read_users(self._database, None, users)

    def latest(self, record: UserRecord) -> Manifest:
        """The latest manifest of a user, which is inside their record: nothing more is read."""
        return self._loader.latest(record)

    def load(self, user: str, revision: Which = None, *, base_digest: str | None = None) -> Loaded:
        """One revision: a number, "latest" (the default), "promoted", or a tag; leaves are views of one row [L, ...].

        Raises RevisionNotFoundError; CorruptRevisionError where the bytes do not match their digest;
        BaseMismatchError where base_digest is given and the adapter was made for another base.
        """
        return self.load_batch([user], revision, base_digest=base_digest)[0]

    def load_batch(
        self, users: Sequence[str], revision: Which = None, *, base_digest: str | None = None
    ) -> list[Loaded]:
        """One revision of each user, in their order, read in parallel. Errors as `load`."""
        manifests, rows = self._loader.load([(user, revision) for user in users], base_digest)
        return [(self.cohort_of(one).layout.unpack(row), one) for one, row in zip(manifests, rows, strict=True)]

    def load_stacked(
        self, users: Sequence[str], revision: Which = None, *, base_digest: str | None = None
    ) -> tuple[AdapterState, list[Manifest]]:
        """One revision of each user, stacked: NumPy leaves [N, L, ...], ready for a population's slots.

        Raises PopulationError where the users are none or of several cohorts, else as `load`.
        """
        manifests, rows_NxB = self._loader.stacked([(user, revision) for user in users], base_digest)
        return self.cohort_of(manifests[0]).layout.unpack(rows_NxB), manifests

    def resolve(self, requests: Sequence[tuple[str, Which]], *, base_digest: str | None = None) -> list[Manifest]:
        """The manifest of each (user, revision), read in parallel. Errors as `load`."""
        return self._loader.resolve(requests, base_digest)

    def read_rows(self, manifests: Sequence[Manifest]) -> list[np.ndarray]:
        """The packed rows of these revisions, uint8 [row_bytes], checked against their digests."""
        return self._loader.rows(manifests)

    def load_optimizer(self, manifest: Manifest) -> dict[str, Any]:
        """The optimizer's state that was committed beside a revision. Raises RevisionNotFoundError where none was."""
        return read_optimizer(self._database, manifest)

    def history(self, user: str | UserRecord) -> list[Manifest]:
        """The user's manifests, oldest first. Raises RevisionNotFoundError for an unknown user."""
        record = self._loader.record(user) if isinstance(user, str) else user
        return self._loader.manifests([(record, at) for at in range(record.oldest, record.latest + 1)])

    def pack(self, cohort: StoredCohort, adapters_N: AdapterState) -> np.ndarray:
        """Stacked adapters (leaves [N, L, ...]) as rows, uint8 [N, row_bytes]: each is what a `Commit` may hold."""
        return cohort.layout.pack_stacked(adapters_N)

    def tag(self, user: str, name: str, revision: Which = None) -> UserRecord:
        """Give a revision (default: the latest) a name, or move the name to it."""
        return self._pointer(pointers.tag, user, name, revision)

    def untag(self, user: str, name: str) -> UserRecord:
        """Take a name away."""
        return self._pointer(pointers.untag, user, name)

    def promote(self, user: str, revision: Which = None, *, expected: int | None = None) -> UserRecord:
        """Make serving follow this revision (default: the latest): `pointers.promote`, which asks no gate."""
        return self._pointer(functools.partial(pointers.promote, expected=expected), user, revision)

    def rollback(self, user: str, revision: Which = None) -> UserRecord:
        """Make serving follow the revision that it followed before, or an earlier promoted one."""
        return self._pointer(pointers.rollback, user, revision)

    def scores(self, manifests: Sequence[Manifest]) -> Sequence[Scores | None]:
        """How each of these revisions was scored last; None where its bytes never were."""
        return read_scores(self._database, manifests)

    def record_scores(self, entries: Sequence[tuple[Manifest, Scores]]) -> None:
        """Keep scores beside their revisions; see `scores.put_scores`."""
        self._writable("record scores")
        put_scores(self._database, entries)

    def promote_scored(self, entries: Sequence[tuple[Manifest, Scores]]) -> Sequence[bool]:
        """Promote those of these revisions that are still what was scored; see `scores.promote_scored`."""
        self._writable("move a pointer")
        return promote_scored(self._database, entries)

    def delete(self, user: str) -> Deletion:
        """Remove every revision of the user, and all that names it; says what else was derived from it.

        The bytes are unreachable when this returns, and gone from the files after `gc`.
        """
        self._writable("delete")
        return deletion.delete(self._database, user)._replace(bases=tuple(self.bases.fitted_on(user)))

    def prune(self, user: str, *, before: int) -> list[int]:
        """Remove the user's revisions below `before`; returns them. See `deletion.prune`."""
        self._writable("prune")
        return deletion.prune(self._database, user, before)

    def tainted(self, user: str) -> Sequence[Derived]:
        """The revisions of others that were derived from the user's, whether or not the user is still there."""
        return deletion.tainted(self._database, user)

    def _pointer(self, change: Callable[..., UserRecord], *arguments: Any) -> UserRecord:
        self._writable("move a pointer")
        return change(self._database, *arguments)

    def _writable(self, what: str) -> None:
        if self._read_only:
            raise CatalogError(f"cannot {what}: {self._database.place!r} was opened read-only")

    def verify(
        self, users: Sequence[str] | None = None, *, progress: Callable[[int], None] = lambda users: None
    ) -> Audit:
        """Read and check every revision of these users, or of all; see `verify.verify`."""
        return verify(self._database, self._registry, users=users, trusted=self._trusted, progress=progress)

    def gc(self, *, grace_s: float = GRACE_S, say: Callable[[str], None] = lambda line: None) -> Collected:
        """Give back the bytes of what was deleted, replaced or abandoned; see `gc.collect`."""
        self._writable("collect garbage")
        return collect(self._database, self._registry, grace_s=grace_s, say=say)

    def users(self, where: UserFilter = EVERYONE) -> Iterator[tuple[UserRecord, Manifest]]:
        """Each user that is meant, with the latest manifest, as `listing.matching`."""
        return matching(self._database, self._loader, where)

    def page(self, where: UserFilter = EVERYONE, *, limit: int, after: str | None = None, scan: int) -> Page:
        """At most `limit` of them, from where another page ended: `listing.page`."""
        return page(self._database, self._loader, where, limit=limit, after=after, scan=scan)

    # The last method, because its name hides the built-in in the annotations of those below it.
    def list(self, prefix: str = "", **where: Any) -> Sequence[UserRecord]:
        """The users whose id starts with `prefix` and who match `where` (fields of `UserFilter`), sorted by id."""
        found = (record for record, _ in self.users(UserFilter(prefix=prefix, **where)))
        return sorted(found, key=lambda record: record.user)
