"""Programs lowered for CUDA on a machine without a GPU, and the Triton kernels inside them."""

import jax
from jax._src.lib import triton
from jax.interpreters import mlir
from jaxlib.mlir import ir

TARGETS = ("__gpu$xla.gpu.triton", "triton_kernel_call_ffi")  # jax 0.10's custom call and its successor's


def exported(call, operands) -> str:
    """The module of call(*operands), operands being arrays or their shapes."""
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
