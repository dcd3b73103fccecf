"""Rows cut along their tokens: each device of the ambient mesh (`jax.set_mesh`) has the activations of its part.

The rule "sequence" says along which mesh axes (`context`). What is done token by token stays where the tokens are. In
attention the queries stay, and keys and values of whole rows come to each device: an all-gather of what is narrowest,
whose mask knows nothing of the cut (context parallelism of arXiv 2407.21783, section 3.3.2). Each device then looks at
all keys of a row, where one device alone leaves out the later ones.
"""

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from popax.errors import ConfigError
from popax.sharding import ShardingRules, free_axes

FREE = PartitionSpec.UNCONSTRAINED


def cut_axes(length: int, rules: ShardingRules) -> tuple[str, ...]:
    """The mesh axes along which rows of so many tokens are cut; () without any, and for the one token of a decode step.

    Raises ConfigError where the tokens do not divide.
    """
    axes = free_axes(("sequence",), rules)
    if not axes or length == 1:
        return ()
    shape = jax.sharding.get_abstract_mesh().shape
    if length % (parts := math.prod(shape[name] for name in axes)):
        raise ConfigError(
            f"rows of {length} tokens do not divide over {' x '.join(axes)} = {parts} devices: make their length a "
            f"multiple of {parts}, or the mesh axis shorter"
        )
    return axes


def keep_cut(x_BxTxD: jax.Array, rules: ShardingRules) -> jax.Array:
    """x, its tokens on the devices that have them; its other axes are the partitioner's affair."""
    axes = cut_axes(x_BxTxD.shape[1], rules)
    return jax.lax.with_sharding_constraint(x_BxTxD, PartitionSpec(FREE, axes, FREE)) if axes else x_BxTxD


def whole_rows(keys: jax.Array, queries: int, rules: ShardingRules) -> jax.Array:
    """keys [B, S, ...] on every device that has a part of the rows' `queries` tokens."""
    if not cut_axes(queries, rules):
        return keys
    return jax.lax.with_sharding_constraint(keys, PartitionSpec(FREE, None, *(FREE,) * (keys.ndim - 2)))


def token_by_token(
    function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], rules: ShardingRules
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """function(x [B, T, D], everybody's weights, targets [B, T]) -> [B, T], each device doing its own tokens.

    For a function that makes rows of all tokens: the partitioner cannot say of such rows that they are cut along users
    and along the sequence, and would do all of them on every device.
    """

    def call(x: jax.Array, weights: jax.Array, targets: jax.Array) -> jax.Array:
        axes = cut_axes(x.shape[1], rules) if x.ndim == 3 else ()
        if not axes:
            return function(x, weights, targets)
        tokens = PartitionSpec(None, axes)
        # The users' axes too: a vmap over users whose axes are the partitioner's makes a program that is refused.
        return jax.shard_map(
            function,
            in_specs=(tokens, PartitionSpec(), tokens),
            out_specs=tokens,
            axis_names={*axes, *free_axes(("population",), rules)},
            check_vma=False,
        )(x, weights, targets)

    return call
