"""Flat rows of many slots with their derivative, and decode: what the API calls on an accelerator."""

import functools

import jax
import jax.numpy as jnp

from popax.kernels import dispatch
from popax.kernels.indexed_lora import ops
from popax.kernels.indexed_lora.arg_specs import DecodeSpec, GroupedSpec
from popax.kernels.indexed_lora.reference_decode import Site


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped(runs: int, x_MxD, a_SxRxD, b_SxRxF, scale_S, slot_M, rank_S, y_MxF) -> jax.Array:
    """y_m + s (x_m A[slot_m]^T) B[slot_m], in y's dtype. runs: the rows are so many stretches of equal length, each of
    one slot."""
    return _forward(runs, x_MxD, a_SxRxD, b_SxRxF, scale_S, slot_M, rank_S, y_MxF)[0]


def _forward(runs, x_MxD, a_SxRxD, b_SxRxF, scale_S, slot_M, rank_S, y_MxF):
    return _run(ops.GROUPED, runs, x_MxD, b_SxRxF, (x_MxD, a_SxRxD, b_SxRxF, scale_S, slot_M, rank_S, y_MxF))


def _run(op, runs, x_MxD, b_SxRxF, operands):
    slots, rank, d_out = b_SxRxF.shape
    implementations = {
        name: functools.partial(call, **{"runs" if name == dispatch.XLA else "most_runs": runs})
        for name, call in op.implementations.items()
    }
    spec = GroupedSpec("", x_MxD.shape[0], slots, runs, x_MxD.shape[1], d_out, rank)
    return dispatch.run(op.name, implementations, spec, *operands, dtype=x_MxD.dtype.name, block_types=op.block_types)


def _grouped_fwd(runs, x_MxD, a_SxRxD, b_SxRxF, scale_S, slot_M, rank_S, y_MxF):
    out_MxF, h_RxM = _forward(runs, x_MxD, a_SxRxD, b_SxRxF, scale_S, slot_M, rank_S, y_MxF)
    return out_MxF, (x_MxD, h_RxM, a_SxRxD, b_SxRxF, scale_S, slot_M, rank_S)


def _grouped_bwd(runs, residuals, g_MxF):
    x_MxD, _, _, b_SxRxF, *_ = residuals
    gradients = _run(ops.GROUPED_BACKWARD, runs, x_MxD, b_SxRxF, (g_MxF, *residuals))
    return (*gradients, None, None, g_MxF)


grouped.defvjp(_grouped_fwd, _grouped_bwd)


@jax.custom_vjp
def decode(x_TxD, sites: tuple[Site, ...], scales, slot_T, rank_S) -> tuple[jax.Array, ...]:
    """The same for a token or so in each slot, at all sites that share x in one launch: `reference_decode.decode`.

    Its derivative is the grouped one's, site by site.
    """
    (tokens, d_in), (slots, rank, _) = x_TxD.shape, sites[0][0].shape
    widths = tuple(b_SxRxF.shape[2] for _, b_SxRxF, _ in sites)
    spec = DecodeSpec("", tokens, slots, min(tokens, slots), d_in, widths, rank)
    operands = (tuple(y for *_, y in sites), x_TxD, tuple((a, b) for a, b, _ in sites), scales, slot_T, rank_S)
    op = ops.DECODE
    return dispatch.run(
        op.name, op.implementations, spec, *operands, dtype=x_TxD.dtype.name, block_types=op.block_types
    )


def _decode_fwd(*operands):
    return decode(*operands), operands


def _decode_bwd(operands, cotangents):
    def site_by_site(x_TxD, sites, scales, slot_T, rank_S):
        return tuple(
            grouped(x_TxD.shape[0], x_TxD, a_SxRxD, b_SxRxF, scale_S, slot_T, rank_S, y_TxF)
            for (a_SxRxD, b_SxRxF, y_TxF), scale_S in zip(sites, scales, strict=True)
        )

    return jax.vjp(site_by_site, *operands)[1](cotangents)


decode.defvjp(_decode_fwd, _decode_bwd)


def full_rank(factor_SxRxD: jax.Array) -> jax.Array:
    """Every slot's rank, where the pool does not say otherwise."""
    return jnp.full(factor_SxRxD.shape[:1], factor_SxRxD.shape[1], jnp.int32)
