"""Names for the leaves of nested dicts, and selections of one member from a stacked tree."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax


def flatten_named(tree: Mapping[str, Any], *, separator: str = "/") -> dict[str, Any]:
    """Nested dict -> {"outer/inner": leaf}, sorted by name. Raises ValueError where a key holds the separator."""
    return dict(sorted(_named("", tree, separator), key=lambda pair: pair[0]))


# Not a function inside the one above: one that calls itself by a name of its surroundings is a cycle, and would keep
# the leaves, gigabytes of them at times, until the next garbage collection.
def _named(prefix: str, node: Any, separator: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(node, Mapping):
        yield prefix, node
        return
    for key, child in node.items():
        if separator in str(key):
            raise ValueError(f"key {key!r} contains the separator {separator!r}")
        yield from _named(f"{prefix}{separator}{key}" if prefix else str(key), child, separator)


def unflatten_named(flat: Mapping[str, Any], *, separator: str = "/") -> dict[str, Any]:
    """The inverse of `flatten_named`."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *outer, last = name.split(separator)
        node = tree
        for key in outer:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def member(tree: Any, index: int | jax.Array) -> Any:
    """One member of a tree whose every leaf has the population axis first."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def set_member(tree: Any, index: int | jax.Array, value: Any) -> Any:
    """The stacked tree with member `index` replaced; pure."""
    return jax.tree.map(lambda leaf, new: leaf.at[index].set(new), tree, value)
