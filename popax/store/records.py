"""Small records under safe keys: JSON that detects a changed bit, and key names that no user id can steer."""

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from popax.errors import CatalogError

_CHECK_BYTES = 8
_SCALARS = (str, int, float, bool, type(None))
# What records of users mostly consist of, common words last: deflate refers to it, and a record of 600 bytes takes 190.
# A million users' records then fit in memory, which halves a batched load. Part of the catalog's format.
_DICTIONARY = (
    b'"signature":{"key":"","value":""},"codec":{"error":0.0,"name":"int8"},"optimizer":{"digest":"","layout":""},'
    b'"oldest":,"promotions":[,"tags":{"derived_from":[["shard":"parent":"best_step":"kept_step":"tokens":"loss":'
    b'"learning_rate":0.0001,"next":{"latest":1,"manifest":{"cohort":"","created":"2026-01-01T00:00:00.000+00:00",'
    b'"digest":"","hparams":{"clip_norm":1.0,"learning_rate":0.001},"metrics":{"bits_per_byte":1.,"skipped":0,'
    b'"steps":100},"provenance":{"data":{"digest":"","examples":1},"seed":0},"revision":1,"row":1,"run":"","user":"",'
    b'"version":"0.1.0"},"user":""}'
)


class BrokenRecordError(ValueError):
    """The record's bytes are not those that were written. Internal: readers say whose record it is."""


def seal(record: Mapping[str, Any]) -> bytes:
    """The record as deflated JSON, after a check of these bytes (64 bits of their sha256)."""
    body = deflated(canonical(record).encode())
    return check(body) + body


def unseal(data: bytes) -> dict[str, Any]:
    """The inverse of `seal`. Raises BrokenRecordError where a single bit differs."""
    body = data[_CHECK_BYTES:]
    if data[:_CHECK_BYTES] != check(body):
        raise BrokenRecordError("the record does not match its own check")
    return parsed(inflated(body))


def check(body: bytes) -> bytes:
    """What stands before a record's bytes."""
    return hashlib.sha256(body).digest()[:_CHECK_BYTES]


def deflated(text: bytes) -> bytes:
    """With the catalog's dictionary; `inflated` is the inverse."""
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS, zdict=_DICTIONARY)
    return deflate.compress(text) + deflate.flush()


def inflated(body: bytes) -> bytes:
    return zlib.decompressobj(-zlib.MAX_WBITS, _DICTIONARY).decompress(body)


def parsed(text: bytes) -> dict[str, Any]:
    """JSON as `canonical` writes it."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:  # NaN and Infinity, which JSON itself has no words for
        return json.loads(text)


def canonical(value: Any) -> str:
    """One JSON text per value: sorted keys, no spaces. NumPy and JAX scalars and small arrays become plain numbers.

    Raises CatalogError on what JSON cannot hold.
    """
    try:
        return _ENCODER.encode(value)
    except (TypeError, ValueError) as error:
        raise CatalogError(f"cannot be stored as JSON: {error}; pass strings, numbers, lists and dicts only") from error


def as_stored(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """The record as it will be read back: {} for None, plain numbers, lists for tuples."""
    if not record:
        return {}
    # A million records are mostly this plain: they need no way through JSON and back.
    return copied if (copied := _plain_copy(record)) is not None else json.loads(canonical(record))


def text_digest(*parts: str) -> str:
    """sha256 over the parts with their lengths, so that no two lists of parts share a digest."""
    joined = b"".join(len(raw).to_bytes(8, "little") + raw for raw in (part.encode() for part in parts))
    return hashlib.sha256(joined).hexdigest()


def user_hash(user: str) -> str:
    """128 bits of the id's sha256, as hex: the only form in which an id enters a key.

    Ids are compared by their exact code points: two that merely look alike, or differ in case, are two users.
    Raises CatalogError on an empty id and on one that UTF-8 cannot hold.
    """
    if not isinstance(user, str) or not user:
        raise CatalogError(f"user id {user!r}: a user id is a non-empty string")
    try:
        return hashlib.sha256(user.encode()).hexdigest()[:32]
    except UnicodeEncodeError as error:
        raise CatalogError(
            f"user id {shown(user)} holds the lone surrogate U+{ord(user[error.start]):04X}, which UTF-8 cannot store; "
            "decode the id properly where it enters"
        ) from error


def shown(user: str) -> str:
    """The id as a message may print it: escaped, and short."""
    text = ascii(user)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(user)} characters)"


def user_key(user: str) -> str:
    """The user's pointers and latest manifest."""
    return f"user/{user_hash(user)}"


def manifest_prefix(user: str) -> str:
    return f"manifest/{user_hash(user)}/"


def manifest_key(user: str, revision: int) -> str:
    """A superseded revision's manifest. Zero-padded, so that keys sort as revisions do."""
    return f"{manifest_prefix(user)}{revision:010d}"


def derived_prefix(parent: str) -> str:
    return f"derived/{user_hash(parent)}/"


def derived_key(parent: str, child: str, revision: int) -> str:
    """Says that the child's revision was derived from one of the parent's."""
    return f"{derived_prefix(parent)}{user_hash(child)}/{revision:010d}"


def scores_prefix(user: str) -> str:
    return f"scores/{user_hash(user)}/"


def scores_key(user: str, revision: int) -> str:
    """How a revision did on held-out text."""
    return f"{scores_prefix(user)}{revision:010d}"


def layout_key(digest: str) -> str:
    """How packed optimizer states, or bases, of one kind are laid out."""
    return f"layout/{digest}"


def cohort_key(cohort: str) -> str:
    return f"cohort/{cohort}"


def next_row_key(cohort: str) -> str:
    return f"next_row/{cohort}"


def rows_array(cohort: str, label: str | None) -> str:
    """The name of the array that a cohort's rows lie in. label: of a codec; its rows are of another length, and have
    their own."""
    return cohort if label is None else f"{cohort}.{label}"


def optimizer_array(cohort: str, layout: str) -> str:
    """The name of the array that optimizer states of one layout (its digest) lie in, beside their cohort's rows."""
    return f"{cohort}.optimizer.{layout[:16]}"


def rows_path(cohort: str) -> str:
    return f"rows/{cohort}/"


def row_key(cohort: str, index: int) -> str:
    """The chunk of one row of the zarr3 array at `rows_path`."""
    return f"{rows_path(cohort)}c/{index}/0"


def basis_array(cohort: str, layout: str) -> str:
    """The name of the array that a cohort's bases of one layout (its digest) lie in."""
    return f"{cohort}.bases.{layout[:16]}"


def fitted_prefix(user: str) -> str:
    return f"fitted/{user_hash(user)}/"


def fitted_key(user: str, array: str, row: int) -> str:
    """Says that a revision of the user's had a part in a basis."""
    return f"{fitted_prefix(user)}{array}/{row:010d}"


def shared_key(digest: str) -> str:
    return f"shared/{digest}"


def _plain_copy(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """A copy of nested dicts of JSON's own scalars; None where there is anything else."""
    copied: dict[str, Any] = {}
    for name, value in record.items():
        if type(value) is dict:
            value = _plain_copy(value)
            if value is None:
                return None
        elif type(value) not in _SCALARS:
            return None
        if type(name) is not str:
            return None
        copied[name] = value
    return copied


def _plain(value: Any) -> Any:
    if hasattr(value, "__array__"):
        return np.asarray(value).tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} {value!r}")


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=_plain)
