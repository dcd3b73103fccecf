"""The op's rows of the table: stacked and indexed, forward and backward."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from popax.kernels import tpu
from popax.kernels.op import Cost, Op, nbytes
from popax.kernels.shared_core import pallas_gpu, pallas_tpu, reference
from popax.kernels.shared_core.arg_specs import (
    INDEXED_SPECS,
    MATRIX,
    PREFILL_SPECS,
    STACKED_SPECS,
    IndexedSpec,
    StackedSpec,
)


def _abstract(dtype, *shape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _core_shape(spec) -> tuple[int, ...]:
    return (spec.rank, spec.rank) if spec.core == MATRIX else (spec.rank,)


def _flat_pool(call, core_at: int):
    """call, whose pool of matrices has flat rows [S, R R]: a [S, R, R] is padded to 128 lanes wherever a TPU needs it
    with the rank minor. The operand two places before the pool is a [R, D]."""

    def flat(*operands, **options):
        rank, pool_S = operands[core_at - 2].shape[0], operands[core_at]
        if pool_S.shape[1] == rank:
            return call(*operands, **options)
        matrices_S = pool_S.reshape(-1, rank, rank)
        outputs = call(*operands[:core_at], matrices_S, *operands[core_at + 1 :], **options)
        return tuple(each.reshape(pool_S.shape) if each.shape == matrices_S.shape else each for each in outputs)

    return flat


def _flat_pools(calls: dict, core_at: int) -> dict:
    return {name: _flat_pool(call, core_at) for name, call in calls.items()}


def _forward_operands(spec: StackedSpec, dtype):
    users, tokens = spec.population, spec.tokens
    return (
        _abstract(dtype, users, tokens, spec.d_in),
        _abstract(dtype, spec.rank, spec.d_in),
        _abstract(dtype, spec.rank, spec.d_out),
        _abstract(dtype, users, *_core_shape(spec)),
        _abstract(jnp.float32, users),
        _abstract(dtype, users, tokens, spec.d_out),
    )


def _backward_operands(spec: StackedSpec, dtype):
    _, *factors, g = _forward_operands(spec, dtype)
    return g, _abstract(dtype, spec.population, spec.rank, spec.tokens), *factors


def _indexed_operands(spec: IndexedSpec, dtype):
    return (
        _abstract(dtype, spec.tokens, spec.d_in),
        _abstract(dtype, spec.rank, spec.d_in),
        _abstract(dtype, spec.rank, spec.d_out),
        _abstract(dtype, spec.slots, math.prod(_core_shape(spec))),
        _abstract(jnp.float32, spec.slots),
        _abstract(jnp.int32, spec.tokens),
        _abstract(jnp.int32, spec.slots),
        _abstract(dtype, spec.tokens, spec.d_out),
    )


def _indexed_backward_operands(spec: IndexedSpec, dtype):
    _, *factors, g = _indexed_operands(spec, dtype)
    return g, _abstract(dtype, spec.rank, spec.tokens), *factors


def _example(operands):
    """Slots in runs of equal length, every slot's rank the whole."""

    def example(spec, dtype, seed: int) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng(seed)
        shapes = operands(spec, dtype)
        arrays = [rng.standard_normal(each.shape, np.float32).astype(each.dtype) for each in shapes]
        if isinstance(spec, IndexedSpec):
            slot_V = rng.permutation(np.arange(spec.runs) % spec.slots)
            at = next(place for place, each in enumerate(shapes) if each.dtype == jnp.int32)
            arrays[at] = np.repeat(slot_V, spec.tokens // spec.runs).astype(np.int32)
            arrays[at + 1] = np.full((spec.slots,), spec.rank, np.int32)
        return tuple(arrays)

    return example


def _flops(spec, rows: int, core_products: int) -> int:
    core = spec.rank if spec.core == MATRIX else 1
    return 2 * rows * spec.rank * (spec.d_in + spec.d_out + core_products * core)


def _forward_cost(spec: StackedSpec, dtype) -> Cost:
    operands = _forward_operands(spec, dtype)
    return Cost(_flops(spec, spec.population * spec.tokens, 1), nbytes(operands) + nbytes(operands[-1]))


def _backward_cost(spec: StackedSpec, dtype) -> Cost:
    operands = _backward_operands(spec, dtype)
    x, _, _, core, scale, _ = _forward_operands(spec, dtype)
    return Cost(_flops(spec, spec.population * spec.tokens, 2), nbytes(operands) + nbytes((x, core, scale)))


def _indexed_cost(spec: IndexedSpec, dtype) -> Cost:
    """Cores of the slots in use only."""
    operands = _indexed_operands(spec, dtype)
    x, a, b, core, *_, y = operands
    cores = min(spec.runs, spec.slots) * nbytes(core) // spec.slots
    return Cost(_flops(spec, spec.tokens, 1), nbytes((x, a, b, y, y)) + cores)


def _indexed_backward_cost(spec: IndexedSpec, dtype) -> Cost:
    g, h, a, b, core, scale, *_ = _indexed_backward_operands(spec, dtype)
    cores = min(spec.runs, spec.slots) * nbytes(core) // spec.slots
    x = _abstract(dtype, spec.tokens, spec.d_in)
    return Cost(_flops(spec, spec.tokens, 2), nbytes((g, h, a, b, x, core, scale)) + cores)


def _two_products(x_NxTxD, a_RxD, b_RxF, core_N, scale_N, y_NxTxF):
    """Each user's B' = s core^T(B) first, then LoRA's two products: the form of merged factors."""
    dtype = x_NxTxD.dtype
    subscripts = "nqr,qf->nrf" if core_N.ndim == 3 else "nr,rf->nrf"
    own_NxRxF = (jnp.einsum(subscripts, core_N, b_RxF) * scale_N[:, None, None].astype(dtype)).astype(dtype)
    accumulate = {"preferred_element_type": jnp.float32}
    h_NxRxT = jnp.einsum("ntd,rd->nrt", x_NxTxD, a_RxD, **accumulate).astype(dtype)
    delta_NxTxF = jnp.einsum("nrt,nrf->ntf", h_NxRxT, own_NxRxF, **accumulate)
    return y_NxTxF + delta_NxTxF.astype(y_NxTxF.dtype), h_NxRxT


def _bounded(kernel):
    """The kernel with the runs that a spec's rows have: a token each in decode, 16 sequences in prefill."""

    def call(rows_MxC, *operands, **options):
        runs = rows_MxC.shape[0] if rows_MxC.shape[0] <= 256 else PREFILL_SPECS[0].runs
        return kernel(rows_MxC, *operands, **({"most_runs": runs} | options))

    return call


def _candidates(spec, implementation: str) -> tuple:
    if implementation == "pallas_triton":
        rows = spec.tokens if isinstance(spec, StackedSpec) else spec.tokens // spec.runs
        tiles = [tile for tile in (16, 64, 128) if tile <= rows] or [1]
        shapes = [(tile, block, span) for tile in tiles for block in (64, 128) for span in (512, 2048)]
        return tuple(pallas_gpu.Blocks(*shape, warps, 3) for shape in shapes for warps in (4, 8))
    shapes = tpu.block_shapes(spec.tokens, spec.d_in, spec.d_out)
    return tuple(pallas_tpu.Blocks(*shape, resident) for shape in shapes for resident in (0, 1))


_TYPES = {"block_types": {"pallas_tpu": pallas_tpu.Blocks, "pallas_triton": pallas_gpu.Blocks}, "blocks": _candidates}

FORWARD = Op(
    name="shared_core.forward",
    specs=STACKED_SPECS,
    operands=_forward_operands,
    example=_example(_forward_operands),
    implementations={
        "xla": reference.forward,
        "pallas_tpu": pallas_tpu.forward,
        "pallas_triton": pallas_gpu.forward,
    },
    rivals={"merged_factor": _two_products},
    cost=_forward_cost,
    donated=(5,),
    **_TYPES,
)
BACKWARD = Op(
    name="shared_core.backward",
    specs=STACKED_SPECS,
    operands=_backward_operands,
    example=_example(_backward_operands),
    implementations={
        "xla": reference.backward,
        "pallas_tpu": pallas_tpu.backward,
        "pallas_triton": pallas_gpu.backward,
    },
    rivals={},
    cost=_backward_cost,
    **_TYPES,
)
INDEXED = Op(
    name="shared_core.indexed",
    specs=INDEXED_SPECS,
    operands=_indexed_operands,
    example=_example(_indexed_operands),
    implementations=_flat_pools(
        {
            "xla": reference.indexed_forward,
            "pallas_tpu": _bounded(pallas_tpu.indexed_forward),
            "pallas_triton": _bounded(pallas_gpu.indexed_forward),
        },
        core_at=3,
    ),
    rivals={},
    cost=_indexed_cost,
    donated=(7,),
    **_TYPES,
)
INDEXED_BACKWARD = Op(
    name="shared_core.indexed_backward",
    specs=PREFILL_SPECS,
    operands=_indexed_backward_operands,
    example=_example(_indexed_backward_operands),
    implementations=_flat_pools(
        {
            "xla": reference.indexed_backward,
            "pallas_tpu": _bounded(pallas_tpu.indexed_backward),
            "pallas_triton": _bounded(pallas_gpu.indexed_backward),
        },
        core_at=4,
    ),
    rivals={},
    cost=_indexed_backward_cost,
    **_TYPES,
)
OPS = (FORWARD, BACKWARD, INDEXED, INDEXED_BACKWARD)
