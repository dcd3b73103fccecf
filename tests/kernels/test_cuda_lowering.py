"""Every Triton form of the table lowers for CUDA on a machine without a GPU, and its Triton module is a valid one."""

import re

import jax
import jax.numpy as jnp
import pytest

from popax.kernels.grouped_matmul import ops as grouped_matmul
from popax.kernels.table import OPS
from tests.kernels.cuda import exported, triton_kernels

TRITON = "pallas_triton"
# Toys, every site of Qwen3-8B, the experts of Qwen3-30B, and each rank and number of slots there: other models' shapes
# say nothing new.
REPRESENTATIVE = re.compile(r"toy|qwen3_8b|qwen3_30b")
CASES = [
    pytest.param(op, spec, id=f"{op.name}-{spec.name}")
    for op in OPS
    if TRITON in op.implementations
    for spec in op.specs
    if REPRESENTATIVE.search(spec.name)
]


@pytest.mark.parametrize(("op", "spec"), CASES)
def test_it_lowers_with_its_kernels_inside(op, spec):
    module = exported(op.implementations[TRITON], op.operands(spec, jnp.bfloat16))
    names = triton_kernels(module)
    assert names
    assert all(name.startswith(f"popax_{op.name.split('.')[0]}") for name in names), names


@pytest.mark.parametrize("op", grouped_matmul.OPS, ids=lambda op: op.name)
def test_experts_in_int8_lower(op):
    rows, w, sizes = op.operands(op.specs[0], jnp.bfloat16)
    narrow = jax.ShapeDtypeStruct(w.shape, jnp.int8)
    assert triton_kernels(exported(op.implementations[TRITON], (rows, narrow, sizes)))


@pytest.mark.parametrize("op", [op for op in OPS if TRITON in op.implementations], ids=lambda op: op.name)
def test_the_tuners_blocks_lower(op):
    """The first, the last and one candidate between them, of one real shape."""
    spec = next(spec for spec in op.specs if re.search("qwen3_(8b|30b)", spec.name))
    candidates = op.blocks(spec, TRITON)
    for blocks in {candidates[0], candidates[len(candidates) // 2], candidates[-1]} if candidates else ():
        call = lambda *operands, blocks=blocks: op.implementations[TRITON](*operands, blocks=blocks)  # noqa: E731
        assert triton_kernels(exported(call, op.operands(spec, jnp.bfloat16)))


def test_a_form_without_a_kernel_is_told_apart():
    assert triton_kernels(exported(lambda x: x * 2, (jax.ShapeDtypeStruct((4,), jnp.float32),))) == []
