"""How one user's adapter becomes one row of bytes, and back."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from popax.errors import CatalogError, PopulationError
from popax.trees import flatten_named, unflatten_named

# XLA's CPU client and device_put take a host buffer without copying it where it is aligned to 64 bytes.
ALIGNMENT = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafLayout:
    """Where one leaf lies in the row: `offset` bytes from its start, little endian, C order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * named_dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowLayout:
    """The packed form of one user's adapter: every leaf at an aligned offset of one uint8 row, padding zero.

    Leaves are sorted by name, so that equal trees have equal layouts, whatever the order of their keys.
    """

    leaves: tuple[LeafLayout, ...]
    row_bytes: int

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> "RowLayout":
        """The layout of a nested dict of arrays or ShapeDtypeStructs. Raises ValueError where a key holds a "/"."""
        leaves, offset = [], 0
        for name, leaf in flatten_named(tree).items():
            entry = LeafLayout(name=name, dtype=np.dtype(leaf.dtype).name, shape=tuple(leaf.shape), offset=offset)
            leaves.append(entry)
            offset = _align(offset + entry.nbytes)
        return cls(leaves=tuple(leaves), row_bytes=offset)

    def pack(self, tree: Mapping[str, Any]) -> np.ndarray:
        """uint8 [row_bytes]. Raises PopulationError where the tree's leaves, shapes or dtypes are not the layout's."""
        return self._pack(tree, ())

    def pack_stacked(self, tree_N: Mapping[str, Any]) -> np.ndarray:
        """uint8 [N, row_bytes] of N adapters stacked on the first axis of every leaf. Errors as `pack`."""
        leaves = list(flatten_named(tree_N).values())
        return self._pack(tree_N, leaves[0].shape[:1] if leaves else (0,))

    def checked(self, adapter: Mapping[str, Any] | np.ndarray) -> np.ndarray:
        """The row of an adapter that is a tree, or is packed already. Errors as `pack`."""
        if isinstance(adapter, Mapping):
            return self.pack(adapter)
        if adapter.dtype != np.uint8 or adapter.shape != (self.row_bytes,):
            raise PopulationError(
                f"a packed adapter of {adapter.dtype} {list(adapter.shape)} does not fit its cohort's rows of uint8 "
                f"[{self.row_bytes}]"
            )
        return adapter

    def _pack(self, tree: Mapping[str, Any], lead: tuple[int, ...]) -> np.ndarray:
        flat = flatten_named(tree)
        if list(flat) != [leaf.name for leaf in self.leaves]:
            differing = sorted(set(flat) ^ {leaf.name for leaf in self.leaves})
            raise PopulationError(f"the adapter does not fit its cohort: only one of them has the leaves {differing}")
        rows = np.zeros((*lead, self.row_bytes), np.uint8)
        for leaf in self.leaves:
            array = np.asarray(flat[leaf.name])
            if (array.shape, array.dtype.name) != ((*lead, *leaf.shape), leaf.dtype):
                raise PopulationError(
                    f"leaf {leaf.name!r} is {array.dtype.name} {list(array.shape)}; "
                    f"its cohort stores {leaf.dtype} {[*lead, *leaf.shape]}"
                )
            little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            rows[..., leaf.offset : leaf.offset + leaf.nbytes] = little.reshape((*lead, -1)).view(np.uint8)
        return rows

    def unpack(self, rows: np.ndarray) -> dict[str, Any]:
        """The tree of a uint8 row, or of rows [N, row_bytes] (leaves then are [N, ...]): views, not copies.

        Raises CatalogError on rows of another length.
        """
        if rows.dtype != np.uint8 or rows.shape[-1:] != (self.row_bytes,):
            raise CatalogError(f"a row of {rows.dtype} {list(rows.shape)} is not the layout's uint8 [{self.row_bytes}]")
        lead, flat = rows.shape[:-1], {}
        for leaf in self.leaves:
            raw = rows[..., leaf.offset : leaf.offset + leaf.nbytes]
            flat[leaf.name] = raw.view(named_dtype(leaf.dtype).newbyteorder("<")).reshape((*lead, *leaf.shape))
        return unflatten_named(flat)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        leaves = [[leaf.name, leaf.dtype, list(leaf.shape), leaf.offset] for leaf in self.leaves]
        return {"leaves": leaves, "row_bytes": self.row_bytes}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "RowLayout":
        leaves = tuple(
            LeafLayout(name=name, dtype=dtype, shape=tuple(shape), offset=offset)
            for name, dtype, shape, offset in record["leaves"]
        )
        return cls(leaves=leaves, row_bytes=record["row_bytes"])

    @property
    def digest(self) -> str:
        """sha256 of the layout's JSON."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def row_digest(row: np.ndarray) -> str:
    """sha256 of a packed row, padding included, as hex: the identity of an adapter's content."""
    return hashlib.sha256((row if row.flags.c_contiguous else np.ascontiguousarray(row)).data).hexdigest()


@functools.cache
def named_dtype(name: str) -> np.dtype:
    """The dtype of this name, those of ml_dtypes (bfloat16, float8_*) included. Raises CatalogError on others."""
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError as error:
        raise CatalogError(f"unknown dtype {name!r}; was it written by a newer popax?") from error


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
