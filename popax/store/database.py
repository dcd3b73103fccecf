"""The OCDBT database under a catalog: where it lies, how it is tuned, and what its failures are called."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorstore as ts

from popax.errors import CatalogError, StorageError
from popax.store.records import rows_path

FORMAT = 1
MARKER = "popax_catalog.json"
# Shard 0 holds all that is small: users, manifests, cohorts; and the rows of a single writer. Each further process of a
# run writes its rows into a shard of its own, a database that holds nothing else.
SHARDS = "shard_{:05d}/"

# OCDBT's default of 8 MiB per B-tree node makes a single commit rewrite, and a cold load read, megabytes: measured at
# 50,000 users 43 ms a commit and 1.0 MB a cold load, against 3.1 ms and 26 KB with 64 KiB nodes. Both values are
# written into the database when it is created, and hold from then on. User records (under 256 bytes) lie in the nodes.
OCDBT_CONFIG = {"max_decoded_node_bytes": 64 << 10, "max_inline_value_bytes": 256}
CACHE_BYTES = 128 << 20
# More rows than any catalog will see; a zarr3 array has no cost for chunks that were never written.
ROW_CAPACITY = 1 << 40

_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
# What TensorStore says when the place it writes to, not the bytes it reads, is at fault.
_REFUSED = re.compile(
    r"RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|CANCELLED"
    r"|Failed to create directory|os_error_code='(?!2')"
)


class Database:
    """An open catalog database: its key-value store, and arrays inside it.

    Write through `kvstore` only. A transaction is atomic within one instance of the OCDBT driver; an array may open
    an instance of its own (the spec of a store that has been read also holds its uuid), and what is written through
    that one is committed apart, even where the transaction as a whole is refused.
    """

    def __init__(self, place: str, root: ts.KvStore.Spec, context: ts.Context):
        self.place = place
        self._root, self._context = root, context
        self._shards: dict[int, ts.KvStore] = {}
        self.kvstore: ts.KvStore = self.shard(0)

    def shard(self, index: int) -> ts.KvStore:
        """The key-value store of a shard, opened once."""
        if index not in self._shards:
            self._shards[index] = ts.KvStore.open(self._spec(index), context=self._context).result()
        return self._shards[index]

    def _spec(self, shard: int) -> dict[str, Any]:
        return {"driver": "ocdbt", "base": (self._root / SHARDS.format(shard)).to_json(), "config": OCDBT_CONFIG}

    def shard_count(self) -> int:
        """How many shards there are."""
        with storage_errors(self.place):
            store = ts.KvStore.open(self._root, context=self._context).result()
            return json.loads(store.read(MARKER).result().value)["shards"]

    def declare_shards(self, count: int) -> None:
        """Write into the marker that there are at least so many shards, before a manifest names one of them."""
        with storage_errors(self.place):
            store = ts.KvStore.open(self._root, context=self._context).result()
            if count > json.loads(store.read(MARKER).result().value)["shards"]:
                store.write(MARKER, json.dumps({"format": FORMAT, "shards": count}).encode()).result()

    @classmethod
    def open(cls, place: str | os.PathLike, *, create: bool, context: ts.Context | None = None) -> "Database":
        """Open the catalog at a local path or a TensorStore URL (gs://, s3://, memory://).

        memory:// lives as long as the context. Raises CatalogError where there is none and `create` is false, or
        where it is of an unknown format; StorageError where the place cannot be read or written.
        """
        name = os.fspath(place)
        context = context or ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        try:
            root = place_spec(name)
        except ValueError as error:
            raise CatalogError(f"{name!r} is no place for a catalog: {error}; give a directory or a URL") from error
        with storage_errors(name):
            store = ts.KvStore.open(root, context=context).result()
            marker = store.read(MARKER).result()
            if marker.state != "value":
                if not create:
                    raise CatalogError(f"no catalog at {name!r}; check the path, or create one with create=True")
                store.write(MARKER, json.dumps({"format": FORMAT, "shards": 1}).encode()).result()
            else:
                _check_format(name, marker.value)
            return cls(name, root, context)

    def create_rows(self, cohort: str, row_bytes: int, shard: int = 0) -> None:
        """Make the array of a cohort's rows in a shard, where there is none."""
        self._open_rows(cohort, row_bytes, shard, create=True)

    def rows(self, cohort: str, row_bytes: int, shard: int = 0) -> ts.TensorStore:
        """A cohort's rows, for reading: uint8 [ROW_CAPACITY, row_bytes], one row a chunk, its bytes as they are."""
        return self._open_rows(cohort, row_bytes, shard, create=False)

    def _open_rows(self, cohort: str, row_bytes: int, shard: int, *, create: bool) -> ts.TensorStore:
        metadata = {
            "shape": [ROW_CAPACITY, row_bytes],
            "data_type": "uint8",
            "fill_value": 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, row_bytes]}},
            # With these two, the chunk of row i is the row itself, under `records.row_key(cohort, i)`.
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "bytes"}],
        }
        spec = {
            "driver": "zarr3",
            "kvstore": {**self._spec(shard), "path": rows_path(cohort)},
            "metadata": metadata,
            "recheck_cached_metadata": False,
        }
        return ts.open(spec, context=self._context, open=True, create=create).result()


@contextlib.contextmanager
def storage_errors(place: str) -> Iterator[None]:
    """Turn what TensorStore raises inside the block into StorageError or CatalogError with the place and the fix."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise storage_error(place, error) from error


def storage_error(place: str, error: Exception) -> CatalogError:
    """The named error for a failure of TensorStore's."""
    if is_refused(error):
        return StorageError(
            f"{place!r} refused: {error}; nothing was committed. Free space or fix the permissions, then repeat"
        )
    return CatalogError(f"{place!r} cannot be read as a catalog: {error}")


def is_refused(error: Exception) -> bool:
    """Whether the storage refused (full, forbidden, away), as opposed to holding wrong bytes or none."""
    missing = isinstance(error, FileNotFoundError)
    return (isinstance(error, OSError) and not missing) or _REFUSED.search(str(error)) is not None


def is_conflict(error: Exception) -> bool:
    """Whether a transaction failed because what it had read was changed by another writer."""
    return str(error).startswith("ABORTED")


def is_local(place: str | os.PathLike) -> bool:
    """Whether the place is a path of this machine's file system, not a URL."""
    return _URL.match(os.fspath(place)) is None


def place_spec(name: str) -> ts.KvStore.Spec:
    """The key-value store of a local directory or a URL. Raises ValueError on a URL that TensorStore does not know."""
    if not is_local(name):
        return ts.KvStore.Spec(name if name.endswith("/") else f"{name}/")
    return ts.KvStore.Spec({"driver": "file", "path": f"{Path(name).expanduser().absolute()}/"})


def _check_format(name: str, marker: bytes) -> None:
    try:
        record = json.loads(marker)
        found = record["format"], record["shards"]
    except (ValueError, KeyError, TypeError) as error:
        raise CatalogError(f"{name!r}: {MARKER} is not a catalog's marker: {error}") from error
    if found[0] != FORMAT:
        raise CatalogError(
            f"{name!r} is a catalog of format {found[0]}; this popax reads format {FORMAT}: use the popax that wrote "
            "it, or a newer one"
        )
