"""One user's op with its VJP; under `jax.vmap` each of the two is one stacked call (popax.kernels.population)."""

import jax

from popax.kernels import dispatch, population
from popax.kernels.stacked_lora.arg_specs import ArgSpec
from popax.kernels.stacked_lora.ops import BACKWARD, FORWARD


def _run(op, x_NxTxD, b_NxRxF, operands):
    (users, tokens, d_in), (_, rank, d_out) = x_NxTxD.shape, b_NxRxF.shape
    return dispatch.run(
        op.name,
        op.implementations,
        ArgSpec("", users, tokens, d_in, d_out, rank),
        *operands,
        dtype=x_NxTxD.dtype.name,
        population=(True,) * len(operands),
        block_types=op.block_types,
    )


def _stacked_forward(x_NxTxD, a_NxRxD, b_NxRxF, scale_N, *y_NxTxF):
    return _run(FORWARD, x_NxTxD, b_NxRxF, (x_NxTxD, a_NxRxD, b_NxRxF, scale_N, *y_NxTxF))


def _stacked_backward(g_NxTxF, x_NxTxD, h_NxRxT, a_NxRxD, b_NxRxF, scale_N):
    return _run(BACKWARD, x_NxTxD, b_NxRxF, (g_NxTxF, x_NxTxD, h_NxRxT, a_NxRxD, b_NxRxF, scale_N))


_forward, _backward = population.batched_op(_stacked_forward), population.batched_op(_stacked_backward)


@jax.custom_vjp
def lora(x_TxD: jax.Array, a_RxD: jax.Array, b_RxF: jax.Array, scale: jax.Array, y_TxF: jax.Array) -> jax.Array:
    """y + s (x A^T) B, in y's dtype. x, a, b may be of other float dtypes; scale is a scalar array."""
    return _forward(x_TxD, a_RxD, b_RxF, scale, y_TxF)[0]


def _lora_fwd(x_TxD, a_RxD, b_RxF, scale, y_TxF):
    out_TxF, h_RxT = _forward(x_TxD, a_RxD, b_RxF, scale, y_TxF)
    return out_TxF, (x_TxD, h_RxT, a_RxD, b_RxF, scale)


def _lora_bwd(residuals, g_TxF):
    return (*_backward(g_TxF, *residuals), g_TxF)


lora.defvjp(_lora_fwd, _lora_bwd)


@jax.custom_vjp
def delta(x_TxD: jax.Array, a_RxD: jax.Array, b_RxF: jax.Array, scale: jax.Array) -> jax.Array:
    """s (x A^T) B, in x's dtype."""
    return _forward(x_TxD, a_RxD, b_RxF, scale)[0]


def _delta_fwd(x_TxD, a_RxD, b_RxF, scale):
    delta_TxF, h_RxT = _forward(x_TxD, a_RxD, b_RxF, scale)
    return delta_TxF, (x_TxD, h_RxT, a_RxD, b_RxF, scale)


delta.defvjp(_delta_fwd, lambda residuals, g_TxF: _backward(g_TxF, *residuals))
