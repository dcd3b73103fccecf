"""Giving bytes back: rows that nothing names, and what the database's files hold beside its current version.

OCDBT only ever adds files. A file is garbage where the current version reaches nothing in it; where it reaches a part,
that part is written anew first (the same value under the same key), so that what was deleted is in no file afterwards.

Why no writer is harmed. While the locks are quiet no commit is under way, so each file that is there then is reached
from the version of that moment, or by none that can still come: later versions reach files of the version before, and
new ones. Such files are listed in that instant, and those of them that a version read afterwards does not reach are
removed. Without locks (at a URL) the list is kept, and what is on it is removed `grace_s` later, when every commit that
was under way has ended.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import tensorstore as ts

from popax.errors import CatalogError
from popax.store.audit_rows import RowCensus
from popax.store.bases import stale_index
from popax.store.database import Database, storage_errors
from popax.store.reader import PARTS, Request, chunks, latest_manifest, part_keys, read_manifests, records_at
from popax.store.records import BrokenRecordError, row_key, seal, unseal
from popax.store.registry import CohortRegistry
from popax.store.tree import Leaf, Place, walk
from popax.store.writer import retried

GRACE_S = 3600.0
SUSPECTS = "gc/suspects"
# One transaction rewrites so much at most: it is in memory.
REWRITE_BYTES = 128 << 20
_NOWHERE = b"\0gc"  # no key ends so

Row = tuple[int, str, int]  # shard, cohort, index


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collected:
    """rows_waiting, files_waiting: noted now, to be removed by a gc that comes after the grace period. bytes_left: of
    all data files afterwards; bytes_dead: of those, what the current version does not reach. Bytes are counted in a
    local directory only."""

    rows_removed: int = 0
    rows_waiting: int = 0
    files_removed: int = 0
    files_waiting: int = 0
    bytes_removed: int = 0
    bytes_rewritten: int = 0
    bytes_left: int = 0
    bytes_dead: int = 0

    def __add__(self, other: "Collected") -> "Collected":
        return Collected(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in _FIELDS})

    def to_dict(self) -> dict[str, int]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


_FIELDS = dataclasses.fields(Collected)


class Suspects(NamedTuple):
    """What looked abandoned at a time (seconds since 1970)."""

    time: float
    rows: list[Row]
    files: dict[str, list[str]]  # by shard


def collect(
    database: Database,
    registry: CohortRegistry,
    *,
    grace_s: float = GRACE_S,
    say: Callable[[str], None] = lambda line: None,
) -> Collected:
    """Remove what nothing names. Safe beside readers and writers; killed at any instant, the next one goes on.

    grace_s: how long what looks abandoned must have been known to: rows of a run that has staged them and not yet
    published, and, where there are no locks, files of commits under way. 0: nobody is staging (or, at a URL, writing),
    remove them now. Raises ConflictError where another gc runs, CorruptRevisionError where a record cannot be read: its
    rows would look unnamed (`verify` names what is broken).
    """
    with database.locks.collecting(), storage_errors(database.place):
        noted, now = _read_suspects(database), time.time()
        due = noted is not None and now - noted.time >= grace_s
        known = noted if noted is not None and due else Suspects(now, [], {})
        say("looking for rows that nothing names")
        total, rows = _collect_rows(database, registry, set(known.rows), grace_s)
        files: dict[str, list[str]] = {}
        for shard in range(database.shard_count()):
            say(f"shard {shard}: writing live parts of files anew")
            total += _evacuate(database, shard)
            listed = _listed(database, shard)
            if not database.locks.real and grace_s > 0:
                files[str(shard)] = sorted(listed)
                listed &= set(known.files.get(str(shard), ()))
            say(f"shard {shard}: removing files")
            total += _remove(database, shard, listed, waiting=files.get(str(shard), []))
        # A note that is not due stands: gc after gc cannot put removal off for ever.
        if noted is None or due or grace_s <= 0:
            waiting = grace_s > 0 and (rows or files)
            _write_suspects(database, Suspects(now, rows, files) if waiting else None, noted)
        return total


def _read_suspects(database: Database) -> Suspects | None:
    found = database.kvstore.read(SUSPECTS).result()
    try:
        record = unseal(found.value) if found.state == "value" else None
    except BrokenRecordError:  # it only saves time: begin again
        return None
    if record is None:
        return None
    return Suspects(record["time"], [(shard, cohort, row) for shard, cohort, row in record["rows"]], record["files"])


def _write_suspects(database: Database, suspects: Suspects | None, noted: Suspects | None) -> None:
    if suspects != noted:
        with database.writing():
            database.kvstore.write(SUSPECTS, suspects and seal(suspects._asdict())).result()


def _collect_rows(
    database: Database, registry: CohortRegistry, known: set[Row], grace_s: float
) -> tuple[Collected, list[Row]]:
    """(what was removed, the rows that wait)."""
    unnamed = list(_unnamed(database, registry))
    gone = [row for row in unnamed if grace_s <= 0 or row in known]
    if gone:
        # Looked for again while nobody commits: a run may have published them since.
        with database.locks.quiet(), database.committing():
            gone = list(set(gone).intersection(_unnamed(database, registry)))
            erased = [database.shard(shard).write(row_key(cohort, row), None) for shard, cohort, row in gone]
            for done in erased:
                done.result()
            for done in [database.kvstore.write(key, None) for key in stale_index(database)]:
                done.result()
    waiting = sorted(set(unnamed).difference(gone)) if grace_s > 0 else []
    return Collected(rows_removed=len(gone), rows_waiting=len(waiting)), waiting


def _unnamed(database: Database, registry: CohortRegistry) -> Iterator[Row]:
    census = RowCensus(database)
    for part in PARTS:
        for keys in chunks(part_keys(database, "user", part)):
            _name_rows(database, registry, census, keys)
    return census.unnamed()


def _name_rows(database: Database, registry: CohortRegistry, census: RowCensus, keys: Sequence[str]) -> None:
    older: list[Request] = []
    for _, record in records_at(database, keys):
        if isinstance(record, CatalogError):
            raise record
        if record is not None:
            if (latest := latest_manifest(record, registry.known)) is not None:
                census.name(latest)
            older += [Request(record.user, at) for at in range(record.oldest, record.latest)]
    for manifest in read_manifests(database, older, registry.known):
        if manifest is not None:  # pruned meanwhile
            census.name(manifest)


class Batch(NamedTuple):
    """What one transaction moves: values, and the leaves (by a key that lies in each) that move with none of them."""

    values: list[bytes]
    leaves: list[bytes]
    bytes: int


def _evacuate(database: Database, shard: int) -> Collected:
    """Write anew what is live in files that also hold what is not.

    Afterwards the only dead bytes are nodes that this itself wrote, of what is alive: those that one of its
    transactions replaced of the one before, and those that OCDBT writes twice in one commit.
    """
    base, rewritten = database.base(shard), 0
    for batch in _batches(base, _mixed(database, shard, base)):
        _rewrite(database, shard, batch)
        rewritten += batch.bytes
    return Collected(bytes_rewritten=rewritten)


def _mixed(database: Database, shard: int, base: ts.KvStore) -> set[str]:
    """The files that hold something live, and something else."""
    sizes, live = database.data_files(shard), _live(base)
    return {
        name for name, extent in live.items() if not extent.solid or _goes_on(base, name, extent.end, sizes.get(name))
    }


def _goes_on(base: ts.KvStore, name: str, end: int, size: int | None) -> bool:
    """Whether the file has bytes after `end`. Where its size is not known, the next byte is asked for."""
    if size is not None:
        return size > end
    try:
        return base.read(name, byte_range=slice(end, end + 1)).result().state == "value"
    except ValueError:
        return False


def _batches(base: ts.KvStore, mixed: set[str]) -> Iterator[Batch]:
    """All that is live in these files, leaves in the order of their keys."""
    batch = Batch([], [], 0)
    for node in walk(base) if mixed else ():
        if not isinstance(node, Leaf):
            continue
        moved = [(key, place.bytes) for key, place in node.values if place.file in mixed]
        if moved or node.place.file in mixed:
            batch.values.extend(key for key, _ in moved)
            batch.leaves.extend([] if moved else node.keys[:1])
            batch = batch._replace(bytes=batch.bytes + node.place.bytes + sum(count for _, count in moved))
        if batch.bytes >= REWRITE_BYTES:
            yield batch
            batch = Batch([], [], 0)
    if batch.bytes:
        yield batch


def _rewrite(database: Database, shard: int, batch: Batch) -> None:
    """In one transaction, which is repeated where one of the values is changed meanwhile."""

    def work(transaction: ts.Transaction) -> None:
        store = database.shard(shard).with_transaction(transaction)
        reads = [store.read(key) for key in batch.values]
        found = [(key, read.result()) for key, read in zip(batch.values, reads, strict=True)]
        written = [store.write(key, one.value) for key, one in found if one.state == "value"]
        # To erase a key that is not there changes nothing, and writes the leaf where it would be anew.
        written += [store.write(key + _NOWHERE, None) for key in batch.leaves]
        for one in written:
            one.result()

    retried(database, len(batch.values) + len(batch.leaves), work)


@dataclasses.dataclass
class Extent:
    """What is live in a file: how many bytes, and where the last of them ends."""

    bytes: int = 0
    end: int = 0

    @property
    def solid(self) -> bool:
        """Whether there is nothing else before the end."""
        return self.bytes == self.end

    def add(self, place: Place) -> None:
        self.bytes += place.bytes
        self.end = max(self.end, place.start + place.bytes)


def _live(base: ts.KvStore) -> dict[str, Extent]:
    """What is live in each data file that holds anything live."""
    live: dict[str, Extent] = {}
    for node in walk(base):
        places = [node.place, *(place for _, place in node.values)] if isinstance(node, Leaf) else [node.place]
        for place in places:
            live.setdefault(place.file, Extent()).add(place)
    return live


def _listed(database: Database, shard: int) -> set[str]:
    """The data files of an instant at which no commit is under way."""
    with database.locks.quiet():
        return set(database.data_files(shard))


def _remove(database: Database, shard: int, listed: set[str], waiting: Iterable[str]) -> Collected:
    """Delete those of the listed files that the current version, read after they were listed, does not reach."""
    live, sizes = _live(database.base(shard)), database.data_files(shard)
    gone = listed.difference(live)
    database.remove_files(shard, gone)
    left = {name: size or 0 for name, size in sizes.items() if name not in gone}
    return Collected(
        files_removed=len(gone),
        files_waiting=len(set(waiting).difference(live, gone)),
        bytes_removed=sum(sizes.get(name) or 0 for name in gone),
        bytes_left=sum(left.values()),
        bytes_dead=sum(max(size - live[name].bytes, 0) for name, size in left.items() if name in live),
    )
