"""The cohorts of a catalog: found, registered once, and their arrays opened."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from popax.adapters.base import AdapterConfig, SiteSpec
from popax.errors import CatalogError
from popax.store.bases import BasisShelf
from popax.store.basis import codec_from
from popax.store.codec import RowCodec, codec_of
from popax.store.cohort import StoredCohort
from popax.store.database import Database, storage_errors
from popax.store.layout import RowLayout, row_digest
from popax.store.manifest import Manifest
from popax.store.reader import keys_under
from popax.store.records import BrokenRecordError, cohort_key, seal, shared_key, unseal
from popax.store.writer import retried
from popax.types import AdapterState


class CohortRegistry:
    """Reads each cohort's record at most once; it never changes after registration."""

    def __init__(self, database: Database):
        self._database = database
        self._cohorts: dict[str, StoredCohort] = {}
        self.bases = BasisShelf(database)

    def find(self, name: str) -> StoredCohort | None:
        """The cohort of this id, None where the catalog has none."""
        if name not in self._cohorts:
            with storage_errors(self._database.place):
                found = self._database.kvstore.read(cohort_key(name)).result()
            if found.state != "value":
                return None
            try:
                self._cohorts[name] = StoredCohort.from_dict(unseal(found.value))
            except BrokenRecordError as error:
                raise CatalogError(f"the record of cohort {name} is corrupt: {error}; restore the files") from error
        return self._cohorts[name]

    def all(self) -> list[StoredCohort]:
        """Every cohort that was registered, in the order of their ids."""
        keys = keys_under(self._database.kvstore, self._database.place, cohort_key(""))
        return [self.known(key.removeprefix(cohort_key(""))) for key in keys]

    def known(self, name: str) -> StoredCohort:
        """The cohort of this id. Raises CatalogError where the catalog has none."""
        cohort = self.find(name)
        if cohort is None:
            raise CatalogError(f"{self._database.place!r} has no cohort {name}; was it registered in another catalog?")
        return cohort

    def codec(self, manifest: Manifest) -> RowCodec | None:
        """How the revision's row is stored, None where as it is. Raises CatalogError, and as `BasisShelf.of`."""
        if manifest.codec is None:
            return None
        if "basis" not in manifest.codec:
            return codec_of(manifest.codec["name"])
        return codec_from(self.known(manifest.cohort), self.bases.of(manifest), manifest.codec)

    def shared(self, cohort: StoredCohort) -> AdapterState:
        """The frozen arrays that all of the cohort's users share: {} where its method has none."""
        if cohort.shared_digest is None or cohort.shared_layout is None:
            return {}
        with storage_errors(self._database.place):
            found = self._database.kvstore.read(shared_key(cohort.shared_digest)).result()
        row = np.frombuffer(found.value, np.uint8)
        if row_digest(row) != cohort.shared_digest:
            raise CatalogError(
                f"the shared arrays {cohort.shared_digest} of cohort {cohort.id} are corrupt; make them again from the "
                f"base {cohort.base_digest}, or restore the catalog's files"
            )
        return cohort.shared_layout.unpack(row)

    def find_or_register(
        self,
        config: AdapterConfig,
        specs: Mapping[str, SiteSpec],
        base_digest: str,
        layout: RowLayout,
        shared: Mapping[str, Any] | None,
        *,
        read_only: bool,
    ) -> StoredCohort:
        """See `Catalog.cohort`."""
        if not layout.row_bytes:
            raise CatalogError("the adapters of this cohort have no bytes; give the config at least one target")
        wanted = StoredCohort.of(config, specs, base_digest, layout, shared)
        found = self.find(wanted.id)
        if found is None and read_only:
            raise CatalogError(f"cannot register cohort {wanted.id}: {self._database.place!r} was opened read-only")
        if found is None:
            self._register(wanted, shared)
            found = self.known(wanted.id)
        if shared and found.shared_digest != wanted.shared_digest:
            raise CatalogError(
                f"cohort {found.id} has shared arrays of digest {found.shared_digest}, not {wanted.shared_digest}: its "
                "users were trained with those; use catalog.shared(cohort) instead of making them again"
            )
        return found

    def _register(self, cohort: StoredCohort, shared: Mapping[str, Any] | None) -> None:
        # The array alone means nothing: the cohort exists once its record does.
        with storage_errors(self._database.place):
            self._database.create_rows(cohort.id, cohort.layout.row_bytes)

        def work(transaction: ts.Transaction) -> None:
            store = self._database.kvstore.with_transaction(transaction)
            if store.read(cohort_key(cohort.id)).result().state == "value":
                return  # another process was first
            if shared and cohort.shared_layout:
                packed = cohort.shared_layout.pack(shared).tobytes()
                store.write(shared_key(str(cohort.shared_digest)), packed).result()
            store.write(cohort_key(cohort.id), seal(cohort.to_dict())).result()

        retried(self._database, 1, work)
