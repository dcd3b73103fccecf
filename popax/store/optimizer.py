"""The optimizer's state beside a revision: packed like an adapter, its layout stored once."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from popax.errors import CorruptRevisionError, RevisionNotFoundError
from popax.store.database import Database, storage_errors
from popax.store.layout import RowLayout, row_digest
from popax.store.manifest import Manifest
from popax.store.records import BrokenRecordError, layout_key, optimizer_key, seal, unseal


class PackedOptimizer(NamedTuple):
    """A state as bytes. record: the digests of its layout and of its bytes, as the manifest keeps them."""

    row: np.ndarray
    layout: RowLayout
    record: dict[str, str]


def pack_optimizer(tree: Mapping[str, Any]) -> PackedOptimizer:
    """A nested dict of arrays, packed."""
    layout = RowLayout.of(tree)
    row = layout.pack(tree)
    return PackedOptimizer(row, layout, {"layout": layout.digest, "digest": row_digest(row)})


def put_optimizers(store: ts.KvStore, entries: Sequence[tuple[Manifest, PackedOptimizer]]) -> None:
    """Into the store's transaction."""
    layouts = {packed.record["layout"]: packed.layout for _, packed in entries}
    writes = [store.write(layout_key(digest), seal(layout.to_dict())) for digest, layout in layouts.items()]
    for manifest, packed in entries:
        writes.append(store.write(optimizer_key(manifest.user, manifest.revision), packed.row.tobytes()))
    for write_future in writes:
        write_future.result()


def read_optimizer(database: Database, manifest: Manifest) -> dict[str, Any]:
    """The state kept beside a revision, NumPy leaves. Raises RevisionNotFoundError where none was kept."""
    if manifest.optimizer is None:
        raise RevisionNotFoundError(
            f"{manifest.shown} was committed without its optimizer's state; continue with a fresh one, or train with "
            "the state kept"
        )
    with storage_errors(database.place):
        row = database.kvstore.read(optimizer_key(manifest.user, manifest.revision)).result()
        layout = database.kvstore.read(layout_key(manifest.optimizer["layout"])).result()
    try:
        found = RowLayout.from_dict(unseal(layout.value))
    except BrokenRecordError as error:
        raise CorruptRevisionError(f"the layout of the optimizer's state of {manifest.shown}: {error}") from error
    packed = np.frombuffer(row.value, np.uint8)
    if row_digest(packed) != manifest.optimizer["digest"]:
        raise CorruptRevisionError(
            f"the optimizer's state of {manifest.shown} does not have digest {manifest.optimizer['digest']}; continue "
            "with a fresh one, or restore the catalog's files"
        )
    return found.unpack(packed)
