"""The records of users and of revisions: what every load needs in fixed fields, the rest deflated until somebody asks.

A thousand users' records are read at a time, and most of what they hold (settings, metrics, provenance) is not looked
at: unpacking it would take longer than all else that a load does with them.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from popax.store.records import BrokenRecordError, canonical, check, deflated, inflated, parsed

_RECORD = struct.Struct("<8sIII")  # check of what follows; latest; bytes of the user's id; bytes of the pointers
_FIXED = struct.Struct("<IIQ16s32sB")  # revision, shard, row, cohort, digest, flags
_ENCODED = 1  # the row is stored in another form: `codec` is in the rest
_NAMES = ("revision", "shard", "row", "cohort", "digest")
_POINTERS = ("oldest", "promotions", "tags")


class StoredManifest(Mapping[str, Any]):
    """A manifest as it is stored. `fixed` is there at once; anything else is unpacked when it is first asked for."""

    __slots__ = ("_rest", "encoded", "fixed", "raw")

    def __init__(self, raw: bytes):
        revision, shard, row, cohort, digest, flags = _FIXED.unpack_from(raw)
        self.raw, self._rest, self.encoded = raw, None, bool(flags & _ENCODED)
        self.fixed: dict[str, Any] = {
            "revision": revision,
            "shard": shard,
            "row": row,
            "cohort": cohort.hex(),
            "digest": digest.hex(),
        }

    @property
    def rest(self) -> dict[str, Any]:
        if self._rest is None:
            self._rest = parsed(inflated(self.raw[_FIXED.size :]))
        return self._rest

    def __getitem__(self, name: str) -> Any:
        return self.fixed[name] if name in self.fixed else self.rest[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.fixed
        yield from self.rest

    def __len__(self) -> int:
        return len(self.fixed) + len(self.rest)


def seal_user(record: Mapping[str, Any]) -> bytes:
    """{"user", "latest", "manifest", and pointers where they say something} after a check of all its bytes. A
    superseded revision is sealed in the same way, without pointers: "latest" is then its own number."""
    user = record["user"].encode()
    pointers = {name: record[name] for name in _POINTERS if name in record}
    text = canonical(pointers).encode() if pointers else b""
    body = user + text + _packed(record["manifest"])
    head = _RECORD.pack(bytes(8), record["latest"], len(user), len(text))[8:]
    return check(head + body) + head + body


def unseal_user(data: bytes) -> dict[str, Any]:
    """The inverse of `seal_user`, the manifest as a StoredManifest. Raises BrokenRecordError where a bit differs."""
    if len(data) < _RECORD.size or data[:8] != check(data[8:]):
        raise BrokenRecordError("the record does not match its own check")
    _, latest, user_bytes, pointer_bytes = _RECORD.unpack_from(data)
    at = _RECORD.size + user_bytes
    record = {"user": data[_RECORD.size : at].decode(), "latest": latest}
    if pointer_bytes:
        record |= json.loads(data[at : at + pointer_bytes])
    record["manifest"] = StoredManifest(data[at + pointer_bytes :])
    return record


def _packed(manifest: Mapping[str, Any]) -> bytes:
    if isinstance(manifest, StoredManifest):
        return manifest.raw
    rest = {name: value for name, value in manifest.items() if name not in _NAMES and name != "user"}
    fixed = _FIXED.pack(
        manifest["revision"],
        manifest.get("shard", 0),
        manifest["row"],
        bytes.fromhex(manifest["cohort"]),
        bytes.fromhex(manifest["digest"]),
        _ENCODED if rest.get("codec") else 0,
    )
    return fixed + deflated(canonical(rest).encode())
