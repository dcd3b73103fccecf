"""Rows in fewer bits: each matrix row of a float leaf as small integers under a scale of its own."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from popax.errors import CatalogError, PopulationError
from popax.store.layout import LeafLayout, RowLayout, named_dtype

_SCALE = np.dtype("<f4")


class RowCodec(Protocol):
    """Another form for packed rows to be stored in.

    record: what a manifest keeps of it. label: of the array that such rows lie in. error: relative, of a row to what is
    decoded.
    """

    @property
    def record(self) -> dict[str, Any]: ...
    @property
    def label(self) -> str: ...
    def stored_bytes(self, layout: RowLayout) -> int: ...
    def encode(self, layout: RowLayout, row: np.ndarray) -> np.ndarray: ...
    def decode(self, layout: RowLayout, stored: np.ndarray) -> np.ndarray: ...
    def error(self, layout: RowLayout, row: np.ndarray, decoded: np.ndarray) -> float: ...


class IntegerCodec(NamedTuple):
    """bits: of an entry, as a symmetric integer of -levels .. levels; scale = max |x| over the last axis / levels, so
    |x - x'| <= scale / 2."""

    name: str
    bits: int

    @property
    def levels(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def record(self) -> dict[str, Any]:
        return {"name": self.name}

    @property
    def label(self) -> str:
        return self.name

    def stored_bytes(self, layout: RowLayout) -> int:
        """The length of each encoded row of this layout."""
        return sum(_leaf_bytes(self, leaf) for leaf in layout.leaves)

    def encode(self, layout: RowLayout, row: np.ndarray) -> np.ndarray:
        """uint8 [stored_bytes] of a packed row. Raises PopulationError where a float is not finite."""
        parts = []
        for leaf in layout.leaves:
            raw = row[leaf.offset : leaf.offset + leaf.nbytes]
            parts += _encode_leaf(self, leaf, raw) if is_float(leaf) else [raw]
        return np.concatenate(parts)

    def decode(self, layout: RowLayout, stored: np.ndarray) -> np.ndarray:
        """The packed row, uint8 [row_bytes]; padding zero. Raises CatalogError on another length."""
        wanted = self.stored_bytes(layout)
        if stored.shape != (wanted,):
            raise CatalogError(f"a {self.name} row of {stored.size} bytes, its layout makes {wanted}")
        row, at = np.zeros(layout.row_bytes, np.uint8), 0
        for leaf in layout.leaves:
            part = stored[at : at + _leaf_bytes(self, leaf)]
            row[leaf.offset : leaf.offset + leaf.nbytes] = _decode_leaf(self, leaf, part) if is_float(leaf) else part
            at += len(part)
        return row

    def error(self, layout: RowLayout, row: np.ndarray, decoded: np.ndarray) -> float:
        """||x - x'|| / ||x|| over all float leaves (Frobenius); 0 where both are zero."""
        difference = norm = 0.0
        for leaf in layout.leaves:
            if is_float(leaf):
                one, two = (_floats(leaf, each[leaf.offset : leaf.offset + leaf.nbytes]) for each in (row, decoded))
                difference += float(np.sum((one - two) ** 2))
                norm += float(np.sum(one**2))
        return math.sqrt(difference / norm) if norm else (0.0 if not difference else math.inf)


CODECS = {codec.name: codec for codec in (IntegerCodec("int8", 8), IntegerCodec("int4", 4))}


def codec_of(name: str) -> IntegerCodec:
    """Raises CatalogError on a name that is none."""
    if name not in CODECS:
        raise CatalogError(f"codec {name!r}: one of {', '.join(CODECS)}; was it written by a newer popax?")
    return CODECS[name]


def as_codec(codec: RowCodec | str) -> RowCodec:
    """The codec itself, or that of the name."""
    return codec_of(codec) if isinstance(codec, str) else codec


def rows_label(record: Mapping[str, Any] | None) -> str | None:
    """The label of the codec that a manifest keeps this record of; None without one."""
    if record is None:
        return None
    return record["name"] if "basis" not in record else basis_label(record["basis"], record.get("inner"))


def basis_label(digest: str, inner: str | None) -> str:
    """Of rows that are coefficients in the basis of this digest, themselves encoded or not."""
    return f"basis-{digest[:16]}" + (f".{inner}" if inner else "")


def _encode_leaf(codec: IntegerCodec, leaf: LeafLayout, raw: np.ndarray) -> list[np.ndarray]:
    x_RxD = _floats(leaf, raw).reshape(_matrix(leaf))
    if not np.isfinite(x_RxD).all():
        raise PopulationError(
            f"leaf {leaf.name!r} holds what is not a finite number: it cannot be stored as {codec.name}"
        )
    scale_R = (np.abs(x_RxD).max(axis=1, initial=0.0) / codec.levels).astype(_SCALE)
    safe_Rx1 = np.where(scale_R == 0, 1, scale_R.astype(np.float64))[:, None]
    q_RxD = np.clip(np.rint(x_RxD / safe_Rx1), -codec.levels, codec.levels).astype(np.int8)
    return [scale_R.view(np.uint8), _packed(codec, q_RxD.reshape(-1))]


def _decode_leaf(codec: IntegerCodec, leaf: LeafLayout, stored: np.ndarray) -> np.ndarray:
    rows, width = _matrix(leaf)
    scale_R = stored[: rows * _SCALE.itemsize].copy().view(_SCALE).astype(np.float64)
    q_RxD = _unpacked(codec, stored[rows * _SCALE.itemsize :], rows * width).reshape(rows, width)
    x_RxD = q_RxD * scale_R[:, None]
    return np.frombuffer(x_RxD.astype(named_dtype(leaf.dtype).newbyteorder("<")).tobytes(), np.uint8)


def _packed(codec: IntegerCodec, q: np.ndarray) -> np.ndarray:
    if codec.bits == 8:
        return q.view(np.uint8)
    nibbles = np.zeros(q.size + q.size % 2, np.uint8)
    nibbles[: q.size] = q.view(np.uint8) & 15
    return nibbles[0::2] | nibbles[1::2] << 4


def _unpacked(codec: IntegerCodec, stored: np.ndarray, count: int) -> np.ndarray:
    if codec.bits == 8:
        return stored.view(np.int8)
    nibbles = np.empty(2 * stored.size, np.int8)
    nibbles[0::2], nibbles[1::2] = (stored & 15).view(np.int8), (stored >> 4).view(np.int8)
    return np.where(nibbles > 7, nibbles - 16, nibbles)[:count]


def _leaf_bytes(codec: IntegerCodec, leaf: LeafLayout) -> int:
    if not is_float(leaf):
        return leaf.nbytes
    rows, width = _matrix(leaf)
    return rows * _SCALE.itemsize + -(-rows * width * codec.bits // 8)


def _matrix(leaf: LeafLayout) -> tuple[int, int]:
    """(rows, width): the last axis has one scale."""
    width = leaf.shape[-1] if leaf.shape else 1
    return math.prod(leaf.shape) // max(width, 1), width


def is_float(leaf: LeafLayout) -> bool:
    return np.issubdtype(named_dtype(leaf.dtype), np.floating) or leaf.dtype.startswith(("bfloat", "float8"))


def _floats(leaf: LeafLayout, raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(named_dtype(leaf.dtype).newbyteorder("<")).astype(np.float64)
