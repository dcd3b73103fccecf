"""One user's op with its VJP; under `jax.vmap` each of the two is one stacked call, with W as everybody's.

W is frozen: a derivative by it is refused, and never a zero that looks like one.
"""

from typing import Any

import jax
import jax.numpy as jnp

from popax.kernels import dispatch, population
from popax.kernels.fused_lora import reference
from popax.kernels.fused_lora.arg_specs import ArgSpec
from popax.kernels.fused_lora.ops import BACKWARD, FORWARD


def _run(op, x_NxTxD, w_DxF, b_NxRxF, operands, unbatched_argnums):
    (users, tokens, d_in), (_, rank, d_out) = x_NxTxD.shape, b_NxRxF.shape
    return dispatch.run(
        op.name,
        op.implementations,
        ArgSpec("", users, tokens, d_in, d_out, rank, w_DxF.dtype.name),
        *operands,
        dtype=x_NxTxD.dtype.name,
        population=tuple(at not in unbatched_argnums for at in range(len(operands))),
        block_types=op.block_types,
    )


def _stacked_forward(x_NxTxD, w_DxF, a_NxRxD, b_NxRxF, scale_N, *w_scale_F):
    operands = (x_NxTxD, w_DxF, a_NxRxD, b_NxRxF, scale_N, *w_scale_F)
    return _run(FORWARD, x_NxTxD, w_DxF, b_NxRxF, operands, (1, 5))


def _stacked_backward(g_NxTxF, x_NxTxD, h_NxRxT, w_DxF, a_NxRxD, b_NxRxF, scale_N, *w_scale_F):
    operands = (g_NxTxF, x_NxTxD, h_NxRxT, w_DxF, a_NxRxD, b_NxRxF, scale_N, *w_scale_F)
    return _run(BACKWARD, x_NxTxD, w_DxF, b_NxRxF, operands, (3, 7))


def _batched_op(stacked, op, unbatched_argnums: tuple[int, ...]):
    return population.batched_op(
        stacked, unbatched_argnums=unbatched_argnums, reference=op.implementations[dispatch.XLA]
    )


# By whether the weight has scales: these are an operand more, and everybody's as the weight is.
_forward = {False: _batched_op(_stacked_forward, FORWARD, (1,)), True: _batched_op(_stacked_forward, FORWARD, (1, 5))}
_backward = {
    False: _batched_op(_stacked_backward, BACKWARD, (3,)),
    True: _batched_op(_stacked_backward, BACKWARD, (3, 7)),
}


@jax.custom_vjp
def fused_lora(
    x_TxD: jax.Array,
    w_DxF: jax.Array,
    a_RxD: jax.Array,
    b_RxF: jax.Array,
    scale: jax.Array,
    w_scale_F: jax.Array | None,
) -> jax.Array:
    """(x W) * w_scale + s (x A^T) B, in x's dtype; scale is a scalar array."""
    return _forward[w_scale_F is not None](x_TxD, w_DxF, a_RxD, b_RxF, scale, *_given(w_scale_F))[0]


def _given(w_scale_F) -> tuple[jax.Array, ...]:
    return () if w_scale_F is None else (w_scale_F,)


def _refuse(w_DxF, w_scale_F) -> None:
    asked = [name for name, each in (("w", w_DxF), ("w_scale_F", w_scale_F)) if each is not None and each.perturbed]
    if asked:
        raise TypeError(
            f"{' and '.join(asked)}: the base weight of fused_lora is frozen and has no derivative; "
            "differentiate by x, a, b or scale, or pass jax.lax.stop_gradient of the weight"
        )


def _dense(cotangent):
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        absent: Any = cotangent.aval
        return jnp.zeros(absent.shape, absent.dtype)
    return cotangent


def _fused_lora_fwd(x_TxD, w_DxF, a_RxD, b_RxF, scale, w_scale_F):
    _refuse(w_DxF, w_scale_F)
    x_TxD, w_DxF, a_RxD, b_RxF, scale = (each.value for each in (x_TxD, w_DxF, a_RxD, b_RxF, scale))
    w_scale_F = None if w_scale_F is None else w_scale_F.value
    operands = (x_TxD, w_DxF, a_RxD, b_RxF, scale, *_given(w_scale_F))
    out_TxF, h_RxT = _forward[w_scale_F is not None](*operands)
    return out_TxF, (x_TxD, h_RxT, w_DxF, a_RxD, b_RxF, scale, w_scale_F)


def _fused_lora_bwd(residuals, g_TxF):
    *operands, w_scale_F = residuals
    dx_TxD, da_RxD, db_RxF, ds = _backward[w_scale_F is not None](_dense(g_TxF), *operands, *_given(w_scale_F))
    return dx_TxD, None, da_RxD, db_RxF, ds, None


fused_lora.defvjp(_fused_lora_fwd, _fused_lora_bwd, symbolic_zeros=True)


@jax.custom_vjp
def base(x_GxTxD: jax.Array, w_DxF: jax.Array, w_scale_F: jax.Array | None) -> jax.Array:
    """(x W) * w_scale without an adapter, in x's dtype."""
    return reference.product(x_GxTxD, w_DxF, w_scale_F)


def _base_fwd(x_GxTxD, w_DxF, w_scale_F):
    _refuse(w_DxF, w_scale_F)
    frozen = (w_DxF.value, None if w_scale_F is None else w_scale_F.value)
    return reference.product(x_GxTxD.value, *frozen), frozen


base.defvjp(
    _base_fwd,
    lambda frozen, g_GxTxF: (reference.input_gradient(_dense(g_GxTxF), *frozen), None, None),
    symbolic_zeros=True,
)
