"""The OCDBT database under a catalog: where it lies, how it is tuned, and what its failures are called."""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorstore as ts

from popax.errors import CatalogError, StorageError
from popax.store.locks import CatalogLocks
from popax.store.records import rows_path

FORMAT = 3
MARKER = "popax_catalog.json"
# Shard 0 holds all that is small: users, manifests, cohorts; and the rows of a single writer. Each further process of a
# run writes its rows into a shard of its own, a database that holds nothing else.
SHARDS = "shard_{:05d}/"

# OCDBT's default of 8 MiB per B-tree node makes a single commit rewrite, and a cold load read, megabytes. User records,
# manifests of some 200 bytes included, lie in the nodes. Values, nodes and versions have files of their own: nodes are
# replaced by every commit, values by none, and `gc` need not move values to be rid of nodes. All of it is written into
# the database when it is created, and holds from then on.
OCDBT_CONFIG = {"max_decoded_node_bytes": 16 << 10, "max_inline_value_bytes": 1024}
DATA_PREFIXES = {
    "value_data_prefix": "v/",
    "btree_node_data_prefix": "n/",
    "version_tree_node_data_prefix": "h/",
}
# The leaves of a million users take 360 MB: kept, a load reads nothing but its row.
CACHE_BYTES = 448 << 20
# More rows than any catalog will see; a zarr3 array has no cost for chunks that were never written.
ROW_CAPACITY = 1 << 40

_UNFINISHED = ".__lock"
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
        self.directory = Path(place).expanduser().absolute() if is_local(place) else None
        self.locks = CatalogLocks(self.directory)
        self._shards: dict[int, ts.KvStore] = {}
        self._rows: dict[tuple[str, int], ts.TensorStore] = {}
        self.kvstore: ts.KvStore = self.shard(0)

    def shard(self, index: int) -> ts.KvStore:
        """The key-value store of a shard, opened once."""
        if index not in self._shards:
            self._shards[index] = ts.KvStore.open(self._spec(index), context=self._context).result()
        return self._shards[index]

    def _spec(self, shard: int) -> dict[str, Any]:
        base = self._base_spec(shard).to_json()
        return {"driver": "ocdbt", "base": base, "config": OCDBT_CONFIG, **DATA_PREFIXES}

    def _base_spec(self, shard: int) -> ts.KvStore.Spec:
        return self._root / SHARDS.format(shard)

    def base(self, shard: int) -> ts.KvStore:
        """The store that a shard's own files lie in."""
        return ts.KvStore.open(self._base_spec(shard), context=self._context).result()

    def data_files(self, shard: int) -> dict[str, int | None]:
        """A shard's data files, by their keys in `base`, with their sizes; None at a URL, where listing tells none."""
        if self.directory is None:
            listed = self.base(shard).list().result()
            return {key.decode(): None for key in listed if key.decode().startswith(tuple(DATA_PREFIXES.values()))}
        folder, found = self.directory / SHARDS.format(shard), {}
        for path in (path for prefix in DATA_PREFIXES.values() for path in (folder / prefix).glob("*")):
            with contextlib.suppress(FileNotFoundError):  # a file that was being written has its final name now
                found[path.relative_to(folder).as_posix()] = path.stat().st_size
        return found

    def remove_files(self, shard: int, names: Iterable[str]) -> None:
        """Remove these of `data_files`, those that a killed writer left half-written included."""
        if self.directory is None:
            base = self.base(shard)
            for removed in [base.write(name, None) for name in names]:
                removed.result()
            return
        for name in names:
            (self.directory / SHARDS.format(shard) / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def committing(self) -> Iterator[None]:
        """Around whatever writes to a shard or to the marker.

        TensorStore's file driver writes beside the file that it replaces, under a name of its own, and takes such a
        file over from a writer that was killed; where that one had written more, its last bytes stay (seen with 0.1.86:
        the manifest then cannot be read, nor anything below it). So writers take turns, and each removes what a killed
        one has left: while the turn is held, such a file is nobody's.
        """
        with self.locks.committing():
            if self.directory is not None:
                for left in (*self.directory.glob(f"*{_UNFINISHED}"), *self.directory.glob(f"shard_*/*{_UNFINISHED}")):
                    left.unlink(missing_ok=True)
            yield

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Around a write that is no transaction."""
        with self.locks.writing(), self.committing():
            yield

    def shard_count(self) -> int:
        """How many shards there are."""
        with storage_errors(self.place):
            store = ts.KvStore.open(self._root, context=self._context).result()
            return json.loads(store.read(MARKER).result().value)["shards"]

    def declare_shards(self, count: int) -> None:
        """Write into the marker that there are at least so many shards, before a manifest names one of them."""
        with storage_errors(self.place), self.writing():
            store = ts.KvStore.open(self._root, context=self._context).result()
            if count > json.loads(store.read(MARKER).result().value)["shards"]:
                store.write(MARKER, json.dumps({"format": FORMAT, "shards": count}).encode()).result()

    @classmethod
    def open(cls, place: str | os.PathLike, *, create: bool, context: ts.Context | None = None) -> "Database":
        """Open the catalog at a local path, a TensorStore URL (gs://, s3://, memory://) or a store's JSON.

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
                database = cls(name, root, context)
                with database.writing():
                    store.write(MARKER, json.dumps({"format": FORMAT, "shards": 1}).encode()).result()
                return database
            _check_format(name, marker.value)
            return cls(name, root, context)

    def create_rows(self, cohort: str, row_bytes: int, shard: int = 0) -> None:
        """Make the array of a cohort's rows in a shard, where there is none."""
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
        with self.writing():
            ts.open(spec, context=self._context, open=True, create=True).result()

    def rows(self, cohort: str, shard: int) -> ts.TensorStore:
        """The array of a cohort's rows, to read many at once; opened once. It keeps no rows: they would push the tree's
        nodes out of the cache."""
        if (cohort, shard) not in self._rows:
            spec = {
                "driver": "zarr3",
                "kvstore": {**self._spec(shard), "path": rows_path(cohort)},
                "cache_pool": {"total_bytes_limit": 0},
                "recheck_cached_metadata": False,
            }
            self._rows[cohort, shard] = ts.open(spec, context=self._context, open=True, read=True).result()
        return self._rows[cohort, shard]


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
    """Whether a transaction failed because what it had read was changed by another writer, or its file removed."""
    return str(error).startswith("ABORTED") or is_gone(error)


def is_gone(error: BaseException) -> bool:
    """Whether a file was not there: `gc` has removed it since the manifest that led to it was read, or it is lost."""
    return str(error).startswith("NOT_FOUND")


def is_local(place: str | os.PathLike) -> bool:
    """Whether the place is a path of this machine's file system, not a URL or a store's specification."""
    name = os.fspath(place)
    return _URL.match(name) is None and not name.startswith("{")


def place_spec(name: str) -> ts.KvStore.Spec:
    """The key-value store of a local directory, a URL, or TensorStore's JSON for a store (as an S3 server of one's own
    needs it: endpoint, bucket, path). Raises ValueError on what TensorStore does not know."""
    if name.startswith("{"):
        record = json.loads(name)
        return ts.KvStore.Spec({**record, "path": f"{record.get('path', '').rstrip('/')}/".lstrip("/")})
    if not is_local(name):
        return ts.KvStore.Spec(name if name.endswith("/") else f"{name}/")
    # Not resolved: a link stays one. TensorStore takes no "..".
    return ts.KvStore.Spec({"driver": "file", "path": f"{os.path.abspath(Path(name).expanduser())}/"})


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
