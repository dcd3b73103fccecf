"""The op's rows of the table: what tests compile, what the tuner tries and what the benchmark compares."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popax.kernels import target
from popax.kernels.fused_lora import pallas_gpu, pallas_tpu, quantize, reference, tiling
from popax.kernels.fused_lora.arg_specs import ARG_SPECS, ArgSpec
from popax.kernels.op import Cost, Op, nbytes
from popax.kernels.stacked_lora import pallas_gpu as stacked_gpu
from popax.kernels.stacked_lora import pallas_tpu as stacked_tpu

MOST_CANDIDATES = 12


def _forward_operands(spec: ArgSpec, dtype) -> tuple[jax.ShapeDtypeStruct | None, ...]:
    users, tokens, d_in, d_out, rank, weight = spec[1:]
    abstract = jax.ShapeDtypeStruct
    return (
        abstract((users, tokens, d_in), dtype),
        abstract((d_in, d_out), weight),
        abstract((users, rank, d_in), dtype),
        abstract((users, rank, d_out), dtype),
        abstract((users,), jnp.float32),
        abstract((d_out,), jnp.float32) if weight in quantize.LARGEST else None,
    )


def _backward_operands(spec: ArgSpec, dtype) -> tuple[jax.ShapeDtypeStruct | None, ...]:
    x, *others = _forward_operands(spec, dtype)
    g = jax.ShapeDtypeStruct((spec.population, spec.tokens, spec.d_out), dtype)
    return g, x, jax.ShapeDtypeStruct((spec.population, spec.rank, spec.tokens), dtype), *others


def _example(operands, weight_at: int):
    def example(spec: ArgSpec, dtype, seed: int) -> tuple[np.ndarray | None, ...]:
        rng = np.random.default_rng(seed)
        made = [
            None if each is None else rng.standard_normal(each.shape, np.float32).astype(each.dtype)
            for each in operands(spec, dtype)
        ]
        if spec.weight in quantize.LARGEST:
            w_DxF = rng.standard_normal((spec.d_in, spec.d_out), np.float32)
            made[weight_at], made[-1] = (
                np.asarray(each) for each in quantize.quantize(jnp.asarray(w_DxF), spec.weight)
            )
        return tuple(made)

    return example


def _forward_cost(spec: ArgSpec, dtype) -> Cost:
    """y is written once and never read; h, which only the derivative needs, is not counted."""
    rows = spec.population * spec.tokens
    products = rows * (spec.d_in * spec.d_out + spec.rank * (spec.d_in + spec.d_out))
    moved = nbytes(_forward_operands(spec, dtype)) + rows * spec.d_out * jnp.dtype(dtype).itemsize
    return Cost(2 * products, moved)


def _backward_cost(spec: ArgSpec, dtype) -> Cost:
    rows = spec.population * spec.tokens
    products = rows * (spec.d_in * spec.d_out + 2 * spec.rank * (spec.d_in + spec.d_out))
    operands = _backward_operands(spec, dtype)
    _, x, _, _, a, b, scale, _ = operands
    return Cost(2 * products, nbytes(operands) + nbytes((x, a, b, scale)))


def _stacked() -> Any:
    return stacked_gpu if target.platform() == "cuda" else stacked_tpu


def _matmul_then_kernel(x_NxTxD, w_DxF, a_NxRxD, b_NxRxF, scale_N, w_scale_F):
    """XLA's product, then the stacked op's kernel, which reads x and y once more."""
    y_NxTxF = reference.product(x_NxTxD, w_DxF, w_scale_F)
    return _stacked().forward(x_NxTxD, a_NxRxD, b_NxRxF, scale_N, y_NxTxF)


def _matmul_then_kernel_backward(g_NxTxF, x_NxTxD, h_NxRxT, w_DxF, a_NxRxD, b_NxRxF, scale_N, w_scale_F):
    dx_NxTxD, *factors = _stacked().backward(g_NxTxF, x_NxTxD, h_NxRxT, a_NxRxD, b_NxRxF, scale_N)
    return (reference.input_gradient(g_NxTxF, w_DxF, w_scale_F) + dx_NxTxD, *factors)


def _candidates(operands, *, backward: bool):
    def candidates(spec: ArgSpec, implementation: str) -> tuple:
        if implementation == "pallas_triton":
            shapes = itertools.product((64, 128), (64, 128, 256), (32, 64), (4, 8))
            return tuple(pallas_gpu.Blocks(tile, d_out, d_in, 8, warps, 3) for tile, d_out, d_in, warps in shapes)
        first, *_, w, a, b, _, w_scale = operands(spec, jnp.bfloat16)
        shape = pallas_tpu.product_shape(
            first, w, b if backward else a, transposed=backward, has_w_scale=w_scale is not None
        )
        return tiling.candidates(shape)[:MOST_CANDIDATES]

    return candidates


_BLOCK_TYPES = {"pallas_tpu": tiling.Blocks, "pallas_triton": pallas_gpu.Blocks}

FORWARD = Op(
    name="fused_lora.forward",
    specs=ARG_SPECS,
    operands=_forward_operands,
    example=_example(_forward_operands, 1),
    implementations={
        "xla": reference.forward,
        "pallas_tpu": pallas_tpu.forward,
        "pallas_triton": pallas_gpu.forward,
    },
    rivals={"matmul_then_kernel": _matmul_then_kernel},
    cost=_forward_cost,
    block_types=_BLOCK_TYPES,
    blocks=_candidates(_forward_operands, backward=False),
)
BACKWARD = Op(
    name="fused_lora.backward",
    specs=ARG_SPECS,
    operands=_backward_operands,
    example=_example(_backward_operands, 3),
    implementations={
        "xla": reference.backward,
        "pallas_tpu": pallas_tpu.backward,
        "pallas_triton": pallas_gpu.backward,
    },
    rivals={"matmul_then_kernel": _matmul_then_kernel_backward},
    cost=_backward_cost,
    block_types=_BLOCK_TYPES,
    blocks=_candidates(_backward_operands, backward=True),
)
OPS = (FORWARD, BACKWARD)
