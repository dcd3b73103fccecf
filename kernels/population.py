"""The door through which a population's kernel enters a loss that is written for one user."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

Arrays = tuple[jax.Array, ...]


def door(stacked: Callable[..., Arrays]) -> Callable[..., Arrays]:
    """The one-user function whose `jax.vmap` is one call of `stacked`, operands and results with the population first.

    Operands without the population axis are everybody's and are broadcast. A vmap over that vmap folds its axis into
    the population: users of several cohorts, or several settings of one user, are still one call.
    """
    many = folding(stacked)

    @custom_vmap
    def one_user(*operands):
        return tuple(output[0] for output in stacked(*(operand[None] for operand in operands)))

    @one_user.def_vmap
    def population(axis_size, in_batched, *operands):
        outputs = many(*_all_batched(axis_size, in_batched, operands))
        return outputs, (True,) * len(outputs)

    return one_user


def folding(stacked: Callable[..., Arrays]) -> Callable[..., Arrays]:
    """stacked, whose own vmap reshapes [M, N, ...] to [M N, ...] and calls it once."""

    @custom_vmap
    def many(*operands):
        return tuple(stacked(*operands))

    @many.def_vmap
    def fold(axis_size, in_batched, *operands):
        full = _all_batched(axis_size, in_batched, operands)
        outputs = many(*(operand.reshape(-1, *operand.shape[2:]) for operand in full))
        outputs = tuple(output.reshape(axis_size, -1, *output.shape[1:]) for output in outputs)
        return outputs, (True,) * len(outputs)

    return many


def _all_batched(axis_size: int, in_batched, operands) -> list[jax.Array]:
    return [
        operand if batched else jnp.broadcast_to(operand, (axis_size, *operand.shape))
        for operand, batched in zip(operands, in_batched, strict=True)
    ]
