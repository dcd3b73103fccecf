"""How a population's kernel enters a loss that is written for one user: at the rule of vmap."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

Arrays = tuple[jax.Array, ...]
Stacked = Callable[..., Arrays]


def batched_op(
    stacked: Stacked, *, unbatched_argnums: tuple[int, ...] = (), reference: Stacked | None = None
) -> Stacked:
    """The one-user function whose `jax.vmap` is one call of `stacked`, operands and results with the population first.

    Operands without the population axis are broadcast, but for those at the places `unbatched_argnums`: `stacked`
    takes these without a population axis, always, and they are never copied. A vmap over that vmap folds its axis into
    the population: users of several cohorts, or several settings of one user, are still one call. A vmap that does
    batch one of these is a plain vmap of `reference`, which means the same as `stacked` in XLA and is needed with them.
    """
    assert reference is not None or not unbatched_argnums, "unbatched_argnums need a reference"
    many = folding(stacked, unbatched_argnums=unbatched_argnums, reference=reference)

    def alone(call, *operands):
        lifted = (each if at in unbatched_argnums else each[None] for at, each in enumerate(operands))
        return tuple(output[0] for output in call(*lifted))

    @custom_vmap
    def one_user(*operands):
        return alone(stacked, *operands)

    @one_user.def_vmap
    def population(axis_size, in_batched, *operands):
        if _batches_any(in_batched, unbatched_argnums):
            outputs = _plain_vmap(functools.partial(alone, reference), axis_size, in_batched, operands)
        else:
            outputs = many(*_all_batched(axis_size, in_batched, operands, unbatched_argnums))
        return outputs, (True,) * len(outputs)

    return one_user


def folding(stacked: Stacked, *, unbatched_argnums: tuple[int, ...] = (), reference: Stacked | None = None) -> Stacked:
    """stacked, whose own vmap reshapes [M, N, ...] to [M N, ...] and calls it once; the options are `batched_op`'s."""

    @custom_vmap
    def many(*operands):
        return tuple(stacked(*operands))

    @many.def_vmap
    def fold(axis_size, in_batched, *operands):
        if _batches_any(in_batched, unbatched_argnums):
            outputs = tuple(_plain_vmap(reference, axis_size, in_batched, operands))
            return outputs, (True,) * len(outputs)
        full = _all_batched(axis_size, in_batched, operands, unbatched_argnums)
        flat = (each if at in unbatched_argnums else each.reshape(-1, *each.shape[2:]) for at, each in enumerate(full))
        outputs = tuple(output.reshape(axis_size, -1, *output.shape[1:]) for output in many(*flat))
        return outputs, (True,) * len(outputs)

    return many


def _batches_any(in_batched, places: tuple[int, ...]) -> bool:
    return any(in_batched[place] for place in places)


def _plain_vmap(call, axis_size: int, in_batched, operands) -> Arrays:
    in_axes = tuple(0 if batched else None for batched in in_batched)
    return jax.vmap(call, in_axes=in_axes, axis_size=axis_size)(*operands)


def _all_batched(axis_size: int, in_batched, operands, unbatched_argnums: tuple[int, ...]) -> list[jax.Array]:
    return [
        operand if batched or at in unbatched_argnums else jnp.broadcast_to(operand, (axis_size, *operand.shape))
        for at, (operand, batched) in enumerate(zip(operands, in_batched, strict=True))
    ]
