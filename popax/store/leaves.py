"""Population pytrees as Orbax sees them: leaves by name, one member a chunk, PRNG keys as their data."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from popax.errors import CheckpointError

Description = dict[str, Any]


def named_leaves(tree: Any) -> dict[str, Any]:
    """Any pytree -> {"opt_state.0.mu.site.a": leaf} in the tree's own order; None and empty nodes have no leaves."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in named:
            raise CheckpointError(f"two leaves of the train state are both named {name!r}; rename one of them")
        named[name] = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return named


def population_size(named: Mapping[str, Any]) -> int:
    """N. Raises CheckpointError naming a leaf that has not N as its first axis."""
    sizes = {name: leaf.shape[0] if leaf.shape else None for name, leaf in named.items()}
    first = next(iter(sizes.values()), 0)
    for name, size in sizes.items():
        if size is None or size != first:
            raise CheckpointError(
                f"leaf {name!r} is {list(named[name].shape)}, others have the population axis {first} first; "
                "stack it over the members"
            )
    return first or 0


def one_member(tree: Any) -> Any:
    """The shapes and dtypes of one member of a tree of [N, ...]."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)


def save_request(tree: Any, *, chunk_numbers: bool) -> ocp.args.PyTreeSave:
    """Save with chunks of one member: on one device, and on any mesh (a chunk is then one member's part of a shard).

    chunk_numbers: leaves [N] also; otherwise one number a member is not worth a chunk.
    """
    save_args = jax.tree.map(lambda leaf: ocp.SaveArgs(shard_axes=(0,) if leaf.ndim > 1 or chunk_numbers else ()), tree)
    return ocp.args.PyTreeSave(item=tree, save_args=save_args)


def restore_request(nested: Any) -> ocp.args.PyTreeRestore:
    """Restore where each template (array, ShapeDtypeStruct) says; None and NumPy templates: as NumPy."""
    is_leaf = lambda leaf: leaf is None  # noqa: E731
    return ocp.args.PyTreeRestore(
        item=jax.tree.map(lambda _: 0, nested, is_leaf=is_leaf),
        restore_args=jax.tree.map(_restore_args, nested, is_leaf=is_leaf),
    )


def _restore_args(template: Any) -> ocp.RestoreArgs:
    if template is None or isinstance(template, np.ndarray):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    raw = jax.eval_shape(key_data, template)
    sharding = getattr(template, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=raw.shape, dtype=raw.dtype)


def describe(leaf: Any) -> Description:
    """dtype, shape and, for typed PRNG keys, the implementation, as JSON values."""
    impl = str(jax.random.key_impl(leaf)) if is_key(leaf) and isinstance(leaf, jax.Array) else None
    return {"dtype": str(leaf.dtype), "shape": list(leaf.shape), "key_impl": impl}


def refuse_other(item: str, given: Mapping[str, Any], stored: Mapping[str, Description]) -> None:
    """Raises CheckpointError naming the first leaf of a template that is not what was stored."""
    if set(given) != set(stored):
        raise CheckpointError(f"{item}: only one of template and checkpoint has {sorted(set(given) ^ set(stored))[:5]}")
    for name, leaf in given.items():
        have, want = describe(leaf), stored[name]
        if (have["dtype"], have["shape"]) != (want["dtype"], want["shape"]):
            raise CheckpointError(
                f"{item}: {name!r} was saved as {want['dtype']} {want['shape']}, the template is {have['dtype']} "
                f"{have['shape']}; resume with the configuration of the run that saved it"
            )


def is_key(leaf: Any) -> bool:
    """Whether the leaf is an array of typed PRNG keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_data(leaf: Any) -> Any:
    """Typed PRNG keys [...] -> their data, uint32 [..., words]; other leaves unchanged."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def as_key(leaf: Any, description: Description) -> Any:
    """The inverse of `key_data`, on the leaf's own devices."""
    impl = description["key_impl"]
    return leaf if impl is None else jax.random.wrap_key_data(leaf, impl=impl)
