"""The indexed op's rows of the table: decode, and grouped rows forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from popax.kernels import triton, triton_lora
from popax.kernels.indexed_lora import (
    decode_gpu,
    decode_tpu,
    grouped_gpu,
    grouped_tpu,
    reference_decode,
    reference_grouped,
)
from popax.kernels.indexed_lora.arg_specs import DECODE_SPECS, GROUPED_SPECS, DecodeSpec, GroupedSpec
from popax.kernels.op import Cost, Op, nbytes


def _abstract(dtype, *shape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _decode_operands(spec: DecodeSpec, dtype):
    """y comes first among the operands, so that it can be donated apart from the pools."""
    pools = tuple(
        (_abstract(dtype, spec.slots, spec.rank, spec.d_in), _abstract(dtype, spec.slots, spec.rank, d_out))
        for d_out in spec.d_outs
    )
    outputs = tuple(_abstract(dtype, spec.tokens, d_out) for d_out in spec.d_outs)
    scale = tuple(_abstract(jnp.float32, spec.slots) for _ in spec.d_outs)
    slot = _abstract(jnp.int32, spec.tokens)
    return outputs, _abstract(dtype, spec.tokens, spec.d_in), pools, scale, slot, _abstract(jnp.int32, spec.slots)


def _with_y_first(decode):
    def call(outputs, x_TxD, pools, scale, slot_T, rank_S, **options):
        sites = tuple((a, b, y) for (a, b), y in zip(pools, outputs, strict=True))
        return decode(x_TxD, sites, scale, slot_T, rank_S, **options)

    return call


def _decode_one_hot(x_TxD, sites, scale, slot_T, rank_S):
    """Every token meets every slot's factors, and a mask keeps its own: the form of today's JAX servers."""
    del rank_S
    results = []
    for (a_SxRxD, b_SxRxF, y_TxF), scale_S in zip(sites, scale, strict=True):
        own_TxS = (slot_T[:, None] == jnp.arange(a_SxRxD.shape[0])[None]).astype(jnp.float32) * scale_S[None]
        h_TxSxR = jnp.einsum("td,srd->tsr", x_TxD, a_SxRxD, preferred_element_type=jnp.float32)
        masked_TxSxR = (h_TxSxR * own_TxS[..., None]).astype(x_TxD.dtype)
        delta_TxF = jnp.einsum("tsr,srf->tf", masked_TxSxR, b_SxRxF, preferred_element_type=jnp.float32)
        results.append(y_TxF + delta_TxF.astype(y_TxF.dtype))
    return tuple(results)


def _ragged(x_MxD, a_SxRxD, b_SxRxF, scale_S, slot_M, y_MxF):
    """Rows sorted by slot, a group for every slot of the pool."""
    slots = a_SxRxD.shape[0]
    key_M = jnp.where((slot_M < 0) | (slot_M >= slots), slots, slot_M)
    order_M = jnp.argsort(key_M, stable=True)
    sizes_S = jnp.bincount(key_M, length=slots + 1)[:slots].astype(jnp.int32)
    options = {"preferred_element_type": jnp.float32}
    h_MxR = jax.lax.ragged_dot(x_MxD[order_M], a_SxRxD.transpose(0, 2, 1), sizes_S, **options)
    scale_M = jnp.append(scale_S, 0.0)[key_M[order_M]]
    delta_MxF = jax.lax.ragged_dot((h_MxR * scale_M[:, None]).astype(x_MxD.dtype), b_SxRxF, sizes_S, **options)
    return y_MxF.at[order_M].add(delta_MxF.astype(y_MxF.dtype)), h_MxR


def _decode_ragged(x_TxD, sites, scale, slot_T, rank_S):
    del rank_S
    return tuple(_ragged(x_TxD, a, b, scale_S, slot_T, y)[0] for (a, b, y), scale_S in zip(sites, scale, strict=True))


def _decode_cost(spec: DecodeSpec, dtype) -> Cost:
    outputs, x, *_ = _decode_operands(spec, dtype)
    columns = sum(spec.d_in + d_out for d_out in spec.d_outs)
    adapters = spec.distinct * spec.rank * columns * jnp.dtype(dtype).itemsize
    return Cost(2 * spec.tokens * spec.rank * columns, nbytes(x) + 2 * nbytes(outputs) + adapters)


def _numbers(rng, tree):
    return jax.tree.map(lambda each: rng.standard_normal(each.shape, np.float32).astype(each.dtype), tree)


def _decode_example(spec: DecodeSpec, dtype, seed: int):
    rng = np.random.default_rng(seed)
    *numbers, _, _ = _decode_operands(spec, dtype)
    slot = rng.permutation(np.resize(rng.permutation(spec.slots)[: spec.distinct], spec.tokens)).astype(np.int32)
    return (*_numbers(rng, tuple(numbers)), slot, np.full(spec.slots, spec.rank, np.int32))


def _forward_operands(spec: GroupedSpec, dtype):
    return (
        _abstract(dtype, spec.tokens, spec.d_in),
        _abstract(dtype, spec.slots, spec.rank, spec.d_in),
        _abstract(dtype, spec.slots, spec.rank, spec.d_out),
        _abstract(jnp.float32, spec.slots),
        _abstract(jnp.int32, spec.tokens),
        _abstract(jnp.int32, spec.slots),
        _abstract(dtype, spec.tokens, spec.d_out),
    )


def _backward_operands(spec: GroupedSpec, dtype):
    x, a, b, scale, slot, rank, y = _forward_operands(spec, dtype)
    return y, x, _abstract(dtype, spec.rank, spec.tokens), a, b, scale, slot, rank


def _grouped_example(operands, slot_at: int):
    def example(spec: GroupedSpec, dtype, seed: int):
        rng = np.random.default_rng(seed)
        numbers = list(operands(spec, dtype))
        slots = np.repeat(rng.integers(0, spec.slots, spec.runs), -(-spec.tokens // spec.runs))[: spec.tokens]
        fixed = {slot_at: slots.astype(np.int32), slot_at + 1: np.full(spec.slots, spec.rank, np.int32)}
        return tuple(fixed[at] if at in fixed else _numbers(rng, each) for at, each in enumerate(numbers))

    return example


def _grouped_cost(spec: GroupedSpec, dtype, *, backward: bool) -> Cost:
    columns, size = spec.d_in + spec.d_out, jnp.dtype(dtype).itemsize
    rows = spec.tokens * (columns + (spec.d_in if backward else spec.d_out)) * size
    adapters = min(spec.runs, spec.slots) * spec.rank * columns * size
    # A gradient of the whole pool is a dense result, zeros where a slot has no rows.
    gradients = spec.slots * spec.rank * columns * size if backward else 0
    return Cost(2 * spec.tokens * spec.rank * columns * (2 if backward else 1), rows + adapters + gradients)


def _bounded(kernel, runs: int):
    """The kernel with the bound on runs that its specs share."""
    return functools.partial(kernel, most_runs=runs)


def _grouped_ragged(x_MxD, a_SxRxD, b_SxRxF, scale_S, slot_M, rank_S, y_MxF):
    del rank_S
    return _ragged(x_MxD, a_SxRxD, b_SxRxF, scale_S, slot_M, y_MxF)


def _grouped_one_hot(x_MxD, a_SxRxD, b_SxRxF, scale_S, slot_M, rank_S, y_MxF):
    return _decode_one_hot(x_MxD, ((a_SxRxD, b_SxRxF, y_MxF),), (scale_S,), slot_M, rank_S)


def _decode_candidates(spec: DecodeSpec, implementation: str) -> tuple:
    return decode_gpu.candidates(spec.tokens, spec.distinct) if implementation == "pallas_triton" else ()


def _grouped_candidates(*, backward: bool):
    def candidates(spec: GroupedSpec, implementation: str) -> tuple:
        if implementation != "pallas_triton":
            return ()
        return triton_lora.candidates(spec.tokens // spec.runs, spec.rank, backward=backward)

    return candidates


RUNS = GROUPED_SPECS[0].runs

DECODE = Op(
    name="indexed_lora.decode",
    specs=DECODE_SPECS,
    operands=_decode_operands,
    example=_decode_example,
    implementations={
        "xla": _with_y_first(reference_decode.decode),
        "pallas_tpu": _with_y_first(decode_tpu.decode),
        "pallas_triton": _with_y_first(decode_gpu.decode),
    },
    rivals={"ragged_dot": _with_y_first(_decode_ragged), "one_hot": _with_y_first(_decode_one_hot)},
    cost=_decode_cost,
    block_types={"pallas_tpu": decode_tpu.Blocks, "pallas_triton": decode_gpu.Blocks},
    blocks=_decode_candidates,
    donated=(0,),
)
GROUPED = Op(
    name="indexed_lora.grouped",
    specs=GROUPED_SPECS,
    operands=_forward_operands,
    example=_grouped_example(_forward_operands, 4),
    implementations={
        "xla": functools.partial(reference_grouped.forward, runs=RUNS),
        "pallas_tpu": _bounded(grouped_tpu.forward, RUNS),
        "pallas_triton": _bounded(grouped_gpu.forward, RUNS),
    },
    rivals={"ragged_dot": _grouped_ragged, "one_hot": _grouped_one_hot},
    cost=functools.partial(_grouped_cost, backward=False),
    block_types={"pallas_tpu": grouped_tpu.Blocks, "pallas_triton": triton.Blocks},
    blocks=_grouped_candidates(backward=False),
    donated=(6,),
)
GROUPED_BACKWARD = Op(
    name="indexed_lora.grouped_backward",
    specs=GROUPED_SPECS,
    operands=_backward_operands,
    example=_grouped_example(_backward_operands, 6),
    implementations={
        "xla": functools.partial(reference_grouped.backward, runs=RUNS),
        "pallas_tpu": _bounded(grouped_tpu.backward, RUNS),
        "pallas_triton": _bounded(grouped_gpu.backward, RUNS),
    },
    rivals={},
    cost=functools.partial(_grouped_cost, backward=True),
    block_types={"pallas_tpu": grouped_tpu.Blocks, "pallas_triton": triton.Blocks},
    blocks=_grouped_candidates(backward=True),
)
OPS = (DECODE, GROUPED, GROUPED_BACKWARD)
