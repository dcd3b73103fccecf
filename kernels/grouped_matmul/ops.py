"""The op's rows of the table: what tests compile, what the tuner tries and what the benchmark compares."""

import jax
import jax.numpy as jnp
import numpy as np

from popax.kernels.grouped_matmul import pallas_gpu, reference
from popax.kernels.grouped_matmul.arg_specs import ARG_SPECS, ArgSpec
from popax.kernels.op import Cost, Op, nbytes


def _operands(spec: ArgSpec, dtype, *, back: bool) -> tuple[jax.ShapeDtypeStruct, ...]:
    rows = jax.ShapeDtypeStruct((spec.rows, spec.d_out if back else spec.d_in), dtype)
    w = jax.ShapeDtypeStruct((spec.groups, spec.d_in, spec.d_out), dtype)
    return rows, w, jax.ShapeDtypeStruct((spec.groups,), jnp.int32)


def sizes(spec: ArgSpec, seed: int) -> np.ndarray:
    """Groups as a router makes them: uneven, one of them empty, all rows somebody's."""
    rng = np.random.default_rng(seed)
    share_E = rng.dirichlet(np.full(spec.groups, 4.0))
    share_E[rng.integers(spec.groups)] = 0.0
    return rng.multinomial(spec.rows, share_E / share_E.sum()).astype(np.int32)


def _op(name: str, *, back: bool) -> Op:
    def operands(spec: ArgSpec, dtype):
        return _operands(spec, dtype, back=back)

    def example(spec: ArgSpec, dtype, seed: int) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng(seed)
        drawn = (rng.standard_normal(each.shape, np.float32).astype(each.dtype) for each in operands(spec, dtype)[:2])
        return *drawn, sizes(spec, seed)

    def cost(spec: ArgSpec, dtype) -> Cost:
        rows, w, sizes_E = operands(spec, dtype)
        result = jax.ShapeDtypeStruct((spec.rows, spec.d_in if back else spec.d_out), dtype)
        return Cost(2 * spec.rows * spec.d_in * spec.d_out, nbytes((rows, w, sizes_E, result)))

    return Op(
        name=name,
        specs=ARG_SPECS,
        operands=operands,
        example=example,
        implementations={
            "xla": reference.back if back else reference.matmul,
            "pallas_triton": pallas_gpu.back if back else pallas_gpu.matmul,
        },
        rivals={"ragged_dot": reference.ragged_back if back else reference.ragged_matmul},
        cost=cost,
        block_types={"pallas_triton": pallas_gpu.Blocks},
        blocks=lambda spec, implementation: pallas_gpu.candidates(spec.rows, spec.groups),
    )


FORWARD = _op("grouped_matmul.forward", back=False)
BACK = _op("grouped_matmul.back", back=True)
OPS = (FORWARD, BACK)
