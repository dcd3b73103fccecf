"""Names for the leaves of nested dicts, and selections of one member from a stacked tree."""

from collections.abc import Mapping
from typing import Any

import jax


def flatten_named(tree: Mapping[str, Any], *, separator: str = "/") -> dict[str, Any]:
    """Nested dict -> {"outer/inner": leaf}, sorted by name. Raises ValueError where a key holds the separator."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        if not isinstance(node, Mapping):
            flat[prefix] = node
            return
        for key, child in node.items():
            if separator in str(key):
                raise ValueError(f"key {key!r} contains the separator {separator!r}")
            walk(f"{prefix}{separator}{key}" if prefix else str(key), child)

    walk("", tree)
    return dict(sorted(flat.items()))


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
