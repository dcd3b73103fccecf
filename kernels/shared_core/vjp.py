"""One user's op and the indexed one with their VJPs; under `jax.vmap` the former's two are one stacked call each.

The basis is frozen: a derivative by it is refused, and never a zero that looks like one.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from popax.kernels import dispatch, population
from popax.kernels.shared_core import ops
from popax.kernels.shared_core.arg_specs import IndexedSpec, StackedSpec, variant


def _stacked(op, users, tokens, a_RxD, b_RxF, core_N, dtype, operands, per_user):
    spec = StackedSpec("", users, tokens, a_RxD.shape[1], b_RxF.shape[1], a_RxD.shape[0], variant(core_N))
    return dispatch.run(
        op.name,
        op.implementations,
        spec,
        *operands,
        dtype=dtype.name,
        population=per_user,
        block_types=op.block_types,
    )


def _stacked_forward(x_NxTxD, a_RxD, b_RxF, core_N, scale_N, *y_NxTxF):
    operands = (x_NxTxD, a_RxD, b_RxF, core_N, scale_N, *y_NxTxF)
    per_user = (True, False, False, True, True, *(True for _ in y_NxTxF))
    users, tokens, _ = x_NxTxD.shape
    return _stacked(ops.FORWARD, users, tokens, a_RxD, b_RxF, core_N, x_NxTxD.dtype, operands, per_user)


def _stacked_backward(g_NxTxF, h_NxRxT, a_RxD, b_RxF, core_N, scale_N):
    operands = (g_NxTxF, h_NxRxT, a_RxD, b_RxF, core_N, scale_N)
    users, tokens, _ = g_NxTxF.shape
    per_user = (True, True, False, False, True, True)
    return _stacked(ops.BACKWARD, users, tokens, a_RxD, b_RxF, core_N, h_NxRxT.dtype, operands, per_user)


_forward = population.batched_op(
    _stacked_forward, unbatched_argnums=(1, 2), reference=ops.FORWARD.implementations["xla"]
)
_backward = population.batched_op(
    _stacked_backward, unbatched_argnums=(2, 3), reference=ops.BACKWARD.implementations["xla"]
)


def _refuse(a, b) -> None:
    if a.perturbed or b.perturbed:
        names = " and ".join(name for name, each in (("a", a), ("b", b)) if each.perturbed)
        raise TypeError(
            f"{names}: the shared basis of shared_core is frozen and has no derivative; "
            "differentiate by x, core, scale or y, or pass jax.lax.stop_gradient of the basis"
        )


def _dense(cotangent: Any) -> jax.Array:
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        aval: Any = cotangent.aval
        return jnp.zeros(aval.shape, aval.dtype)
    return cotangent


@jax.custom_vjp
def frozen(a_RxD: jax.Array, b_RxF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(a, b), of which no derivative can be taken: for a form that autodiff goes through."""
    return a_RxD, b_RxF


def _frozen_fwd(a_RxD, b_RxF):
    _refuse(a_RxD, b_RxF)
    return (a_RxD.value, b_RxF.value), None


frozen.defvjp(_frozen_fwd, lambda _, cotangents: (None, None), symbolic_zeros=True)


@jax.custom_vjp
def shared_core(
    x_TxD: jax.Array,
    a_RxD: jax.Array,
    b_RxF: jax.Array,
    core: jax.Array,
    scale: jax.Array,
    y_TxF: jax.Array | None,
) -> jax.Array:
    """y + s core(x A^T) B, in y's dtype, x's without y. core: [R, R] or [R]; scale is a scalar array."""
    return _forward(x_TxD, a_RxD, b_RxF, core, scale, *_given(y_TxF))[0]


def _given(y) -> tuple[jax.Array, ...]:
    return () if y is None else (y,)


def _shared_core_fwd(x_TxD, a_RxD, b_RxF, core, scale, y_TxF):
    _refuse(a_RxD, b_RxF)
    a_RxD, b_RxF, core, scale = (each.value for each in (a_RxD, b_RxF, core, scale))
    y = None if y_TxF is None else y_TxF.value
    out_TxF, h_RxT = _forward(x_TxD.value, a_RxD, b_RxF, core, scale, *_given(y))
    # Residuals are arrays; whether there was a y is in their structure.
    return out_TxF, (h_RxT, a_RxD, b_RxF, core, scale, None if y is None else ())


def _shared_core_bwd(residuals, g_TxF):
    *operands, has_y = residuals
    g_TxF = _dense(g_TxF)
    dx_TxD, dcore, ds = _backward(g_TxF, *operands)
    return dx_TxD, None, None, dcore, ds, None if has_y is None else g_TxF


shared_core.defvjp(_shared_core_fwd, _shared_core_bwd, symbolic_zeros=True)


def _indexed_value(runs: int, x_MxD, a_RxD, b_RxF, core_S, scale_S, slot_M, rank_S, y_MxF) -> jax.Array:
    """y_m + s core[slot_m](x_m A^T) B, in y's dtype. runs: a bound on the runs of equal slots among the rows."""
    return _indexed(ops.INDEXED, runs, x_MxD.dtype, (x_MxD, a_RxD, b_RxF, core_S, scale_S, slot_M, rank_S, y_MxF))[0]


indexed = jax.custom_vjp(_indexed_value, nondiff_argnums=(0,))


def _indexed(op, runs, dtype, operands):
    core_at = 3 if op is ops.INDEXED else 4
    rows_MxC, (a_RxD, b_RxF, core_S) = operands[0], operands[core_at - 2 : core_at + 1]
    flat_S = core_S.reshape(core_S.shape[0], -1)
    operands = (*operands[:core_at], flat_S, *operands[core_at + 1 :])
    implementations = {
        name: call if name == dispatch.XLA else functools.partial(call, most_runs=runs)
        for name, call in op.implementations.items()
    }
    shape = (a_RxD.shape[1], b_RxF.shape[1], a_RxD.shape[0])
    spec = IndexedSpec("", rows_MxC.shape[0], core_S.shape[0], runs, *shape, variant(core_S))
    outputs = dispatch.run(op.name, implementations, spec, *operands, dtype=dtype.name, block_types=op.block_types)
    return tuple(each.reshape(core_S.shape) if each.shape == flat_S.shape else each for each in outputs)


def _indexed_fwd(runs, *primals):
    _refuse(*primals[1:3])
    operands = tuple(primal.value for primal in primals)
    out_MxF, h_RxM = _indexed(ops.INDEXED, runs, operands[0].dtype, operands)
    return out_MxF, (h_RxM, *operands[1:-1])


def _indexed_bwd(runs, residuals, g_MxF):
    g_MxF, h_RxM = _dense(g_MxF), residuals[0]
    dx_MxD, dcore_S, ds_S = _indexed(ops.INDEXED_BACKWARD, runs, h_RxM.dtype, (g_MxF, *residuals))
    return dx_MxD, None, None, dcore_S, ds_S, None, None, g_MxF


indexed.defvjp(_indexed_fwd, _indexed_bwd, symbolic_zeros=True)
