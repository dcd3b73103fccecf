"""What the files of a database hold: the ranges that its current version reaches, node by node."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tensorstore as ts

# Nodes that are read at a time: a few megabytes.
_NODES = 256
MANIFEST = "manifest.ocdbt"


class Place(NamedTuple):
    """A range of a data file: the file's key in the base store, where it begins, and how many bytes it has."""

    file: str
    start: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf node of the B-tree: where it lies, its keys, and where the values lie that are not inside it."""

    place: Place
    keys: tuple[bytes, ...]
    values: tuple[tuple[bytes, Place], ...]


@dataclasses.dataclass(frozen=True)
class Branch:
    """Any other node: of the B-tree above its leaves, or of the tree of versions."""

    place: Place


def walk(base: ts.KvStore) -> Iterator[Leaf | Branch]:
    """Every node of the current version of an OCDBT database, and of its tree of versions; nothing where it is empty.

    base: the store that the database lies in. Node by node, as TensorStore itself decodes them.
    """
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    if base.read(MANIFEST).result().state != "value":
        return
    manifest = ts.ocdbt.dump(base, context=context).result()
    pending = [(node["location"], b"") for node in manifest["version_tree_nodes"]]
    root = manifest["versions"][-1]["root"]
    if "location" in root:
        pending.append((root["location"], b""))
    while pending:
        some = pending[-_NODES:]
        del pending[-_NODES:]
        begun = [ts.ocdbt.dump(base, location, context=context) for location, _ in some]
        for (location, prefix), future in zip(some, begun, strict=True):
            node, is_version = future.result(), location.startswith("versionnode")
            if not is_version and node["height"] == 0:
                yield _leaf(location, prefix, node["entries"])
                continue
            yield Branch(_place(location))
            if not is_version or node["height"]:
                pending += [_child(entry, prefix) for entry in node["entries"]]


def _child(entry: dict[str, Any], prefix: bytes) -> tuple[str, bytes]:
    return entry["location"], prefix + entry.get("subtree_common_prefix", b"")


def _leaf(location: str, prefix: bytes, entries: Sequence[dict[str, Any]]) -> Leaf:
    apart = [entry for entry in entries if "indirect_value" in entry]
    return Leaf(
        _place(location),
        tuple(prefix + entry["key"] for entry in entries),
        tuple((prefix + entry["key"], _place(entry["indirect_value"])) for entry in apart),
    )


def _place(location: str) -> Place:
    """ "btreenode:<base>:n/<file>:<offset>:<length>"."""
    file, start, length = location.split(":", 2)[2].rsplit(":", 2)
    return Place(file, int(start), int(length))
