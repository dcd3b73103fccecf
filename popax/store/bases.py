"""The bases of a catalog: rows of their own, found by what a manifest says, and whose updates each was fitted on."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from popax.errors import CorruptRevisionError
from popax.store.basis import Basis
from popax.store.cohort import StoredCohort
from popax.store.database import Database, is_refused, storage_error, storage_errors
from popax.store.layout import RowLayout
from popax.store.manifest import Manifest
from popax.store.reader import PARTS, keys_under, part_keys, settled
from popax.store.records import (
    BrokenRecordError,
    basis_array,
    fitted_key,
    fitted_prefix,
    layout_key,
    row_key,
    seal,
    shown,
    unseal,
)
from popax.store.writer import retried, write_rows

_CACHED = 32


class Fitted(NamedTuple):
    """A basis that was fitted on the user's revision among others; digest: what manifests name it by."""

    user: str
    revision: int
    digest: str


class BasisShelf:
    """Reads each basis at most once while it is in use; one never changes."""

    def __init__(self, database: Database):
        self._database = database
        # Not functools.lru_cache on a method: that is a cycle, and a catalog's cache of nodes would outlive it.
        self._bases: dict[str, Basis] = {}

    def of(self, manifest: Manifest) -> Basis:
        """The basis that the revision's row is written in. Raises CorruptRevisionError naming the revision."""
        record = manifest.codec
        assert record is not None
        try:
            return self._kept(manifest.cohort, record["layout"], record["row"], record["basis"])
        except (BrokenRecordError, ValueError, OSError) as error:
            if is_refused(error):
                raise storage_error(self._database.place, error) from error
            raise CorruptRevisionError(
                f"the basis of {manifest.shown} is corrupt: {error}; load an earlier revision, or restore the "
                "catalog's files"
            ) from error

    def put(self, cohort: StoredCohort, basis: Basis, fitted_on: Sequence[tuple[str, int]]) -> dict[str, Any]:
        """Keep a basis; returns {"layout", "row"}, by which manifests find it. fitted_on: (user, revision) of each
        revision that had a part in it. Until a manifest names it, `gc` takes it for abandoned."""
        array = basis_array(cohort.id, basis.layout.digest)

        def work(transaction: ts.Transaction) -> int:
            store = self._database.kvstore.with_transaction(transaction)
            row = write_rows(store, array, [basis.packed])
            writes = [store.write(layout_key(basis.layout.digest), seal(basis.layout.to_dict()))]
            for user, revision in fitted_on:
                record = {"user": user, "revision": revision, "digest": basis.digest, "array": array, "row": row}
                writes.append(store.write(fitted_key(user, array, row), seal(record)))
            for written in writes:
                written.result()
            return row

        return {"layout": basis.layout.digest, "row": retried(self._database, 1, work)}

    def fitted_on(self, user: str) -> list[Fitted]:
        """The bases that hold something of the user's, deleted or not, and are still there."""
        keys = keys_under(self._database.kvstore, self._database.place, fitted_prefix(user))
        with storage_errors(self._database.place):
            reads = [self._database.kvstore.read(key) for key in keys]
            found = [future.result() for future in reads]
        try:
            records = [unseal(one.value) for one in found if one.state == "value"]
        except BrokenRecordError as error:
            raise CorruptRevisionError(f"the index of bases of user {shown(user)} is corrupt: {error}") from error
        there = [one for one in records if _is_there(self._database, one["array"], one["row"])]
        return sorted(Fitted(one["user"], one["revision"], one["digest"]) for one in there)

    def _kept(self, cohort: str, layout: str, row: int, digest: str) -> Basis:
        found = self._bases.get(digest)
        if found is None:
            found = self._bases[digest] = self._read(cohort, layout, row, digest)
            for oldest in list(self._bases)[:-_CACHED]:
                self._bases.pop(oldest, None)
        return found

    def _read(self, cohort: str, layout: str, row: int, digest: str) -> Basis:
        store, key = self._database.kvstore, row_key(basis_array(cohort, layout), row)
        packed = settled(store.read(key), lambda: store.read(key))
        described = store.read(layout_key(layout)).result()
        basis = Basis(RowLayout.from_dict(unseal(described.value)).unpack(np.frombuffer(packed.value, np.uint8)))
        if basis.digest != digest:
            raise BrokenRecordError(f"row {row} does not have digest {digest}")
        return basis


def stale_index(database: Database) -> Iterator[str]:
    """The keys that say that a user had a part in a basis which is not there any more."""
    known: dict[tuple[str, int], bool] = {}
    for part in PARTS:
        for key in part_keys(database, "fitted", part):
            _, _, array, row = key.split("/")
            place = (array, int(row))
            if place not in known:
                known[place] = _is_there(database, *place)
            if not known[place]:
                yield key


def _is_there(database: Database, array: str, row: int) -> bool:
    return bool(keys_under(database.kvstore, database.place, row_key(array, row)))


def named_basis(manifest: Manifest) -> tuple[str, int] | None:
    """The array and row of the basis that the revision's row is written in; None where it is in none."""
    record: Mapping[str, Any] = manifest.codec or {}
    return (basis_array(manifest.cohort, record["layout"]), record["row"]) if "basis" in record else None
