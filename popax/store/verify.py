"""Auditing a catalog: every record, manifest and row of every user read and checked, and what nothing names counted."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from popax.errors import CatalogError, CorruptRevisionError, SignatureError
from popax.store.audit_rows import RowCensus
from popax.store.bases import stale_index
from popax.store.database import Database, storage_errors
from popax.store.manifest import Manifest, UserRecord
from popax.store.optimizer import read_optimizer_row
from popax.store.reader import (
    PARTS,
    Request,
    chunks,
    finish_row,
    latest_manifest,
    part_keys,
    read_manifests,
    records_at,
    start_row,
)
from popax.store.records import derived_key, manifest_key, shown, user_key
from popax.store.registry import CohortRegistry
from popax.store.signing import Trust

# Beside a revision, under its user's hash and its number.
_BESIDE = ("manifest", "scores")
# Rows under way at a time: many small ones, few large ones.
_WINDOW_BYTES, _WINDOW_ROWS = 64 << 20, 2048
SHOWN_PROBLEMS = 1000


class Problem(NamedTuple):
    """What is wrong with a user, or with one revision. user: the id, or the key of a record that cannot be read."""

    user: str
    revision: int | None
    what: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audit:
    """What was read, and what is wrong with it.

    row_bytes: of all rows that were read and match their digests. orphan_rows, orphan_records: what no user's record
    leads to, left by a run that was killed; `gc` removes them. problems: the first SHOWN_PROBLEMS of problem_count.
    """

    users: int
    revisions: int
    rows: int
    row_bytes: int
    optimizer_states: int
    orphan_rows: int
    orphan_records: int
    problem_count: int
    problems: tuple[Problem, ...]

    @property
    def clean(self) -> bool:
        """Whether every revision is whole. Orphans harm nobody: they cost space."""
        return not self.problem_count

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "clean": self.clean, "problems": [one._asdict() for one in self.problems]}


def verify(
    database: Database,
    registry: CohortRegistry,
    *,
    users: Sequence[str] | None = None,
    trusted: Trust | None = None,
    progress: Callable[[int], None] = lambda users: None,
) -> Audit:
    """Read every revision of these users (default: all, and look for orphans): records against their seals, pointers
    against revisions, rows and optimizer states against their digests, each row named once; with keys to trust,
    signatures too.

    progress(users read so far) is called now and then. Others may write meanwhile: what they change is read again
    before it is called wrong. Raises StorageError where the store cannot be read, never for what it finds.
    """
    audit = _Auditor(database, registry, trusted, progress)
    if users is not None:
        audit.part([user_key(user) for user in users], asked=dict(zip(map(user_key, users), users, strict=True)))
        return audit.result()
    for part in PARTS:
        audit.expected.clear()
        for keys in chunks(part_keys(database, "user", part)):
            audit.part(keys)
        audit.orphans_beside(part)
    audit.orphans_of_indices()
    return audit.result(orphan_rows=audit.rows.orphans())


class _Auditor:
    def __init__(
        self, database: Database, registry: CohortRegistry, trusted: Trust | None, progress: Callable[[int], None]
    ):
        self.database, self.registry, self._trusted, self._progress = database, registry, trusted, progress
        self.rows = RowCensus(database)
        self._found: dict[str, int] = dict.fromkeys(("users", "revisions", "rows", "row_bytes"), 0)
        self._optimizer_states = self._orphan_records = self._problem_count = 0
        self._problems: list[Problem] = []
        self.expected: set[str] = set()  # keys that stand beside revisions of this part

    def part(self, keys: Sequence[str], asked: dict[str, str] | None = None) -> None:
        """Everything of the users under these keys. asked: their ids, where somebody asked for them by id."""
        records = []
        for key, record in records_at(self.database, keys):
            if isinstance(record, CorruptRevisionError):
                self._problem((asked or {}).get(key, key), None, str(record))
            elif record is not None:
                records.append(record)
                self._pointers(record)
            elif asked:
                self._problem(asked[key], None, f"user {shown(asked[key])} has no revision")
        manifests = [*self._latest(records), *self._superseded(records)]
        for manifest in manifests:
            self._count_manifest(manifest)
        for window in self._windows(manifests):
            begun = [(manifest, start_row(self.database, manifest)) for manifest in window]
            for manifest, future in begun:
                self._row(manifest, future)
        self._found["users"] += len(records)
        self._progress(self._found["users"])

    def orphans_beside(self, part: str) -> None:
        """Count manifests and scores of this part that no record leads to."""
        for kind in _BESIDE:
            for key in part_keys(self.database, kind, part):
                # The user may have been committed or pruned since: what is there now decides.
                if key not in self.expected and not self._is_revision(*key.split("/")[1:]):
                    self._orphan_records += 1

    def orphans_of_indices(self) -> None:
        """Count index entries whose revision, or whose basis, is gone."""
        for part in PARTS:
            for key in part_keys(self.database, "derived", part):
                if not self._is_revision(*key.split("/")[2:]):
                    self._orphan_records += 1
        self._orphan_records += sum(1 for _ in stale_index(self.database))

    def result(self, orphan_rows: int = 0) -> Audit:
        return Audit(
            **self._found,
            optimizer_states=self._optimizer_states,
            orphan_rows=orphan_rows,
            orphan_records=self._orphan_records,
            problem_count=self._problem_count,
            problems=tuple(self._problems),
        )

    def _pointers(self, record: UserRecord) -> None:
        named = {"promotion": record.promotions, "tag": tuple(record.tags.values())}
        if not 1 <= record.oldest <= record.latest:
            self._problem(record.user, None, f"revisions {record.oldest} to {record.latest} are no range")
        for what, revisions in named.items():
            for at in revisions:
                if not record.oldest <= at <= record.latest:
                    self._problem(record.user, at, f"a {what} names it, but {record.oldest} to {record.latest} exist")

    def _latest(self, records: Sequence[UserRecord]) -> Iterator[Manifest]:
        for record in records:
            try:
                manifest = latest_manifest(record, self.registry.find)
            except CatalogError as error:
                self._problem(record.user, record.latest, str(error))
                continue
            if manifest is None:
                self._problem(record.user, record.latest, f"its cohort {record.current['cohort']} is not registered")
            else:
                yield manifest

    def _superseded(self, records: Sequence[UserRecord]) -> Iterator[Manifest]:
        wanted = [Request(one.user, at) for one in records for at in range(one.oldest, one.latest)]
        for start in range(0, len(wanted), _WINDOW_ROWS):
            some = wanted[start : start + _WINDOW_ROWS]
            try:
                found = read_manifests(self.database, some, self.registry.find)
            except CatalogError:
                found = [self._one_manifest(request) for request in some]
            for request, manifest in zip(some, found, strict=True):
                if isinstance(manifest, str) or manifest is None:
                    self._revision_problem(request, manifest or "its manifest, or its cohort, is not there")
                else:
                    yield manifest

    def _one_manifest(self, request: Request) -> Manifest | str | None:
        try:
            return read_manifests(self.database, [request], self.registry.find)[0]
        except CatalogError as error:
            return str(error)

    def _count_manifest(self, manifest: Manifest) -> None:
        self._found["revisions"] += 1
        self.expected.add(manifest_key(manifest.user, manifest.revision))
        self.expected.add(f"scores/{manifest_key(manifest.user, manifest.revision).partition('/')[2]}")
        if manifest.revision > 1 and manifest.parent != manifest.revision - 1:
            self._revision_problem(Request(manifest.user, manifest.revision), f"its parent is {manifest.parent}")
        if not self.rows.name(manifest):
            self._revision_problem(
                Request(manifest.user, manifest.revision), f"row {manifest.row} is another revision's too"
            )
        for parent, _, _ in manifest.derived_from:
            self._present(manifest, derived_key(parent, manifest.user, manifest.revision))
        if manifest.optimizer is not None:
            self._optimizer(manifest)
        if self._trusted is not None:
            self._signature(manifest, self._trusted)

    def _signature(self, manifest: Manifest, trusted: Trust) -> None:
        try:
            trusted.check(manifest, self.registry.known(manifest.cohort))
        except SignatureError as error:
            self._revision_problem(Request(manifest.user, manifest.revision), str(error))

    def _optimizer(self, manifest: Manifest) -> None:
        try:
            read_optimizer_row(self.database, manifest)
            self._optimizer_states += 1
        except CorruptRevisionError as error:
            self._revision_problem(Request(manifest.user, manifest.revision), str(error))

    def _present(self, manifest: Manifest, key: str) -> None:
        with storage_errors(self.database.place):
            read = self.database.kvstore.read(key).result()
        if read.state != "value":
            self._revision_problem(Request(manifest.user, manifest.revision), f"{key} is not there")

    def _windows(self, manifests: Sequence[Manifest]) -> Iterator[list[Manifest]]:
        window, size = [], 0
        for manifest in manifests:
            window.append(manifest)
            size += self.registry.known(manifest.cohort).layout.row_bytes
            if size >= _WINDOW_BYTES or len(window) >= _WINDOW_ROWS:
                yield window
                window, size = [], 0
        yield window

    def _row(self, manifest: Manifest, future: Any) -> None:
        try:
            row = finish_row(self.database, manifest, future)
            self.registry.codec(manifest)  # a row in a basis is worth as much as the basis
        except CorruptRevisionError as error:
            self._revision_problem(Request(manifest.user, manifest.revision), str(error))
            return
        self._found["rows"] += 1
        self._found["row_bytes"] += row.nbytes

    def _revision_problem(self, request: Request, what: str) -> None:
        """A problem, unless the revision has been deleted or pruned since its user's record was read."""
        if self._is_revision(user_key(request.user).partition("/")[2], str(request.revision)):
            self._problem(request.user, request.revision, what)

    def _is_revision(self, hashed: str, revision: str) -> bool:
        """Whether the user of this hash has the revision now; True where the record cannot be read."""
        [(_, record)] = records_at(self.database, [f"user/{hashed}"])
        if record is None or isinstance(record, CorruptRevisionError):
            return record is not None
        return record.oldest <= int(revision) <= record.latest

    def _problem(self, user: str, revision: int | None, what: str) -> None:
        self._problem_count += 1
        if len(self._problems) < SHOWN_PROBLEMS:
            self._problems.append(Problem(user, revision, what))
