"""One user's op with its VJP, and the vmap rules through which a population's kernel enters.

`jax.vmap` of the one-user loss meets `custom_vmap` in the forward and in the backward, and calls the stacked op once
for all users. Nobody writes a population kernel into a loss.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from popax.kernels.stacked_lora.dispatch import stacked_backward, stacked_forward


def _door(stacked: Callable[..., Any]) -> Callable[..., Any]:
    """The one-user function whose vmap is one call of `stacked` with the population axis first."""

    @custom_vmap
    def one_user(*operands):
        outputs = stacked(*(operand[None] for operand in operands))
        return tuple(output[0] for output in outputs)

    @one_user.def_vmap
    def population(axis_size, in_batched, *operands):
        # Operands without the population axis are the same for every user (the scale, or x of a first layer).
        full = (
            operand if batched else jnp.broadcast_to(operand, (axis_size, *operand.shape))
            for operand, batched in zip(operands, in_batched, strict=True)
        )
        outputs = stacked(*full)
        return outputs, (True,) * len(outputs)

    return one_user


_forward = _door(stacked_forward)
_backward = _door(stacked_backward)


@jax.custom_vjp
def lora(x_TxD: jax.Array, a_RxD: jax.Array, b_RxF: jax.Array, scale: jax.Array) -> jax.Array:
    """delta_TxF = s (x A^T) B, in x's dtype. a, b may be of another float dtype; scale is a scalar array."""
    return _forward(x_TxD, a_RxD, b_RxF, scale)[0]


def _lora_fwd(x_TxD, a_RxD, b_RxF, scale):
    delta_TxF, h_TxR = _forward(x_TxD, a_RxD, b_RxF, scale)
    return delta_TxF, (x_TxD, h_TxR, a_RxD, b_RxF, scale)


def _lora_bwd(residuals, g_TxF):
    return _backward(g_TxF, *residuals)


lora.defvjp(_lora_fwd, _lora_bwd)
