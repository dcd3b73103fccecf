"""The op's rows of the table: what tests compile, what the tuner tries and what the benchmark compares."""

import jax
import jax.numpy as jnp
import numpy as np

from popax.kernels import tpu, triton, triton_lora
from popax.kernels.op import Cost, Op, nbytes
from popax.kernels.stacked_lora import pallas_gpu, pallas_tpu, reference
from popax.kernels.stacked_lora.arg_specs import ARG_SPECS, ArgSpec


def _forward_operands(spec: ArgSpec, dtype) -> tuple[jax.ShapeDtypeStruct, ...]:
    users, tokens, d_in, d_out, rank = spec[1:]
    shapes = ((users, tokens, d_in), (users, rank, d_in), (users, rank, d_out))
    x, a, b = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    scale = jax.ShapeDtypeStruct((users,), jnp.float32)
    return x, a, b, scale, jax.ShapeDtypeStruct((users, tokens, d_out), dtype)


def _backward_operands(spec: ArgSpec, dtype) -> tuple[jax.ShapeDtypeStruct, ...]:
    x, a, b, scale, g = _forward_operands(spec, dtype)
    return g, x, jax.ShapeDtypeStruct((spec.population, spec.rank, spec.tokens), dtype), a, b, scale


def _example(operands):
    def example(spec: ArgSpec, dtype, seed: int) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng(seed)
        return tuple(rng.standard_normal(each.shape, np.float32).astype(each.dtype) for each in operands(spec, dtype))

    return example


def _forward_cost(spec: ArgSpec, dtype) -> Cost:
    operands = _forward_operands(spec, dtype)
    moved = nbytes(operands) + nbytes(operands[-1])
    return Cost(2 * spec.population * spec.tokens * spec.rank * (spec.d_in + spec.d_out), moved)


def _backward_cost(spec: ArgSpec, dtype) -> Cost:
    operands = _backward_operands(spec, dtype)
    _, x, _, a, b, scale = operands
    flops = 4 * spec.population * spec.tokens * spec.rank * (spec.d_in + spec.d_out)
    return Cost(flops, nbytes(operands) + nbytes((x, a, b, scale)))


def _ragged_dot(x_NxTxD, a_NxRxD, b_NxRxF, scale_N, y_NxTxF):
    """Tokens in one flat list, a group a user."""
    users, tokens, d_in = x_NxTxD.shape
    sizes_N = jnp.full((users,), tokens, jnp.int32)
    accumulate = {"preferred_element_type": jnp.float32}
    h_MxR = jax.lax.ragged_dot(x_NxTxD.reshape(-1, d_in), a_NxRxD.transpose(0, 2, 1), sizes_N, **accumulate)
    scaled_MxR = (h_MxR * jnp.repeat(scale_N, tokens)[:, None]).astype(x_NxTxD.dtype)
    delta_MxF = jax.lax.ragged_dot(scaled_MxR, b_NxRxF, sizes_N, **accumulate)
    out_NxTxF = y_NxTxF + delta_MxF.reshape(y_NxTxF.shape).astype(y_NxTxF.dtype)
    h_NxRxT = h_MxR.reshape(users, tokens, -1).transpose(0, 2, 1)
    return out_NxTxF, h_NxRxT.astype(x_NxTxD.dtype)


def _one_hot(x_NxTxD, a_NxRxD, b_NxRxF, scale_N, y_NxTxF):
    """Every token meets every user's factors, and a mask keeps its own."""
    users = x_NxTxD.shape[0]
    own_NxS = jnp.eye(users, dtype=jnp.float32)
    h_NxTxSxR = jnp.einsum("ntd,srd->ntsr", x_NxTxD, a_NxRxD, preferred_element_type=jnp.float32)
    masked_NxTxSxR = (h_NxTxSxR * (own_NxS * scale_N[None])[:, None, :, None]).astype(x_NxTxD.dtype)
    delta_NxTxF = jnp.einsum("ntsr,srf->ntf", masked_NxTxSxR, b_NxRxF, preferred_element_type=jnp.float32)
    h_NxRxT = jnp.einsum("ntsr,ns->nrt", h_NxTxSxR, own_NxS)
    return y_NxTxF + delta_NxTxF.astype(y_NxTxF.dtype), h_NxRxT.astype(x_NxTxD.dtype)


def _candidates(*, backward: bool):
    def candidates(spec: ArgSpec, implementation: str) -> tuple:
        if implementation == "pallas_triton":
            return triton_lora.candidates(spec.tokens, spec.rank, backward=backward)
        return tuple(pallas_tpu.Blocks(*shape) for shape in tpu.block_shapes(spec.tokens, spec.d_in, spec.d_out))

    return candidates


_BLOCK_TYPES = {"pallas_tpu": pallas_tpu.Blocks, "pallas_triton": triton.Blocks}

FORWARD = Op(
    name="stacked_lora.forward",
    specs=ARG_SPECS,
    operands=_forward_operands,
    example=_example(_forward_operands),
    implementations={
        "xla": reference.forward,
        "pallas_tpu": pallas_tpu.forward,
        "pallas_triton": pallas_gpu.forward,
    },
    rivals={"ragged_dot": _ragged_dot, "one_hot": _one_hot},
    cost=_forward_cost,
    block_types=_BLOCK_TYPES,
    blocks=_candidates(backward=False),
    donated=(4,),
)
BACKWARD = Op(
    name="stacked_lora.backward",
    specs=ARG_SPECS,
    operands=_backward_operands,
    example=_example(_backward_operands),
    implementations={
        "xla": reference.backward,
        "pallas_tpu": pallas_tpu.backward,
        "pallas_triton": pallas_gpu.backward,
    },
    rivals={},
    cost=_backward_cost,
    block_types=_BLOCK_TYPES,
    blocks=_candidates(backward=True),
)
OPS = (FORWARD, BACKWARD)
