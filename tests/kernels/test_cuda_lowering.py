"""Every Triton form of the table lowers for CUDA on a machine without a GPU, and its Triton module is a valid one."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax._src.lib import triton
from jax.interpreters import mlir
from jaxlib.mlir import ir

from popax.kernels.grouped_matmul import ops as grouped_matmul
from popax.kernels.table import OPS

TRITON = "pallas_triton"
TARGETS = ("__gpu$xla.gpu.triton", "triton_kernel_call_ffi")  # jax 0.10's custom call and its successor's
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


def exported(call, operands) -> str:
    checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in TARGETS]
    # From jax 0.11 on the lowering asks which GPU it is for.
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return jax.export.export(jax.jit(call), platforms=["cuda"], disabled_checks=checks)(*operands).mlir_module()


def triton_kernels(module: str) -> list[str]:
    """The names of the module's Triton kernels; raises where the kernel's own module does not verify."""
    with mlir.make_ir_context() as context, ir.Location.unknown(context):
        triton.dialect.register_dialect(context)  # pyright: ignore[reportPrivateImportUsage]
        calls = []

        def visit(op):
            if (
                "call_target_name" in op.attributes
                and ir.StringAttr(op.attributes["call_target_name"]).value in TARGETS
            ):
                config = op.attributes["mhlo.backend_config"]
                calls.append(ir.StringAttr(config["name"]).value)
                if "ir" in config:
                    ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes).operation.verify()
            return ir.WalkResult.ADVANCE

        ir.Module.parse(module).operation.walk(visit)
    return calls


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
