"""How one user's adapter becomes one row of bytes, and back."""

import dataclasses
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
        flat = flatten_named(tree)
        if list(flat) != [leaf.name for leaf in self.leaves]:
            differing = sorted(set(flat) ^ {leaf.name for leaf in self.leaves})
            raise PopulationError(f"the adapter does not fit its cohort: only one of them has the leaves {differing}")
        row = np.zeros(self.row_bytes, np.uint8)
        for leaf in self.leaves:
            array = np.asarray(flat[leaf.name])
            if (array.shape, array.dtype.name) != (leaf.shape, leaf.dtype):
                raise PopulationError(
                    f"leaf {leaf.name!r} is {array.dtype.name} {list(array.shape)}; "
                    f"its cohort stores {leaf.dtype} {list(leaf.shape)}"
                )
            little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            row[leaf.offset : leaf.offset + leaf.nbytes] = little.reshape(-1).view(np.uint8)
        return row

    def unpack(self, row: np.ndarray) -> dict[str, Any]:
        """The tree of a uint8 row: views into it, not copies. Raises CatalogError on a row of another length."""
        if row.dtype != np.uint8 or row.shape != (self.row_bytes,):
            raise CatalogError(f"a row of {row.dtype} {list(row.shape)} is not the layout's uint8 [{self.row_bytes}]")
        flat = {}
        for leaf in self.leaves:
            raw = row[leaf.offset : leaf.offset + leaf.nbytes]
            flat[leaf.name] = raw.view(named_dtype(leaf.dtype).newbyteorder("<")).reshape(leaf.shape)
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
    return hashlib.sha256(np.ascontiguousarray(row).data).hexdigest()


def named_dtype(name: str) -> np.dtype:
    """The dtype of this name, those of ml_dtypes (bfloat16, float8_*) included. Raises CatalogError on others."""
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError as error:
        raise CatalogError(f"unknown dtype {name!r}; was it written by a newer popax?") from error


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
