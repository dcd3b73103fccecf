"""The optimizer's state beside a revision: packed like an adapter, one more row of the revision's shard."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from popax.errors import CorruptRevisionError, RevisionNotFoundError
from popax.store.database import Database, is_refused, storage_error, storage_errors
from popax.store.layout import RowLayout, row_digest
from popax.store.manifest import Manifest
from popax.store.reader import settled
from popax.store.records import BrokenRecordError, layout_key, row_key, seal, unseal


class PackedOptimizer(NamedTuple):
    """A state as bytes. record: the digests of its layout and of its bytes; a manifest keeps them with the row."""

    row: np.ndarray
    layout: RowLayout
    record: dict[str, Any]


def pack_optimizer(tree: Mapping[str, Any]) -> PackedOptimizer:
    """A nested dict of arrays, packed."""
    layout = RowLayout.of(tree)
    row = layout.pack(tree)
    return PackedOptimizer(row, layout, {"layout": layout.digest, "digest": row_digest(row)})


def put_layouts(store: ts.KvStore, packed: list[PackedOptimizer]) -> None:
    """Into the store's transaction; stored once each, under their digests."""
    layouts = {one.record["layout"]: one.layout for one in packed}
    for written in [store.write(layout_key(digest), seal(layout.to_dict())) for digest, layout in layouts.items()]:
        written.result()


def read_optimizer(database: Database, manifest: Manifest) -> dict[str, Any]:
    """The state kept beside a revision, NumPy leaves. Raises RevisionNotFoundError where none was kept."""
    if manifest.optimizer is None:
        raise RevisionNotFoundError(
            f"{manifest.shown} was committed without its optimizer's state; continue with a fresh one, or train with "
            "the state kept"
        )
    packed = read_optimizer_row(database, manifest)
    with storage_errors(database.place):
        layout = database.shard(manifest.shard).read(layout_key(manifest.optimizer["layout"])).result()
    try:
        return RowLayout.from_dict(unseal(layout.value)).unpack(packed)
    except BrokenRecordError as error:
        raise CorruptRevisionError(f"the layout of the optimizer's state of {manifest.shown}: {error}") from error


def read_optimizer_row(database: Database, manifest: Manifest) -> np.ndarray:
    """The state of a revision that has one, as bytes. Raises CorruptRevisionError where they are not its digest's."""
    store, kept = database.shard(manifest.shard), manifest.optimizer
    assert kept is not None
    key = row_key(manifest.optimizer_array, kept["row"])
    try:
        packed = np.frombuffer(settled(store.read(key), lambda: store.read(key)).value, np.uint8)
        problem = "" if row_digest(packed) == kept["digest"] else f"does not have digest {kept['digest']}"
    except (ValueError, OSError) as error:
        if is_refused(error):
            raise storage_error(database.place, error) from error
        problem = f"cannot be read: {error}"
    if problem:
        raise CorruptRevisionError(
            f"the optimizer's state of {manifest.shown} {problem}; continue with a fresh one, or restore the "
            "catalog's files"
        )
    return packed
