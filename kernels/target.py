"""For which device a program is being traced: the ambient mesh says, else the default device.

A topology that is not attached is named by `jax.set_mesh(mesh)` around the lowering, which a caller needs anyway to
compile for it.
"""

from typing import Any

import jax

# Bytes of vector memory of one core, by device kind (the vendor's figures, as jax's own table has them).
VMEM_BYTES = {
    "TPU v4": 16 << 20,
    "TPU v5 lite": 128 << 20,
    "TPU v5e": 128 << 20,
    "TPU v5": 64 << 20,
    "TPU v5p": 64 << 20,
    "TPU v6 lite": 128 << 20,
    "TPU v6e": 128 << 20,
    "TPU7x": 64 << 20,
}
LEAST_VMEM_BYTES = 16 << 20


def _ambient():
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh.abstract_device


def _default_device() -> Any:
    """What `jax.default_device(...)` was given: a device, a platform's name, or None."""
    return getattr(jax.config, "jax_default_device")  # noqa: B009 - made at run time, unknown to type checkers


def platform() -> str:
    """ "tpu", "cuda", "rocm" or "cpu"."""
    device = _ambient()
    if device is not None:
        name = device.platform
    elif isinstance(default := _default_device(), str):
        name = default.split(":")[0]
    else:
        name = default.platform if default is not None else jax.default_backend()
    return "cuda" if name == "gpu" else name


def device_kind() -> str:
    """The device's own name: "TPU v5 lite", "NVIDIA H200", "cpu"."""
    device = _ambient()
    if device is not None:
        return device.device_kind
    default = _default_device()
    if default is None or isinstance(default, str):
        return jax.devices(default.split(":")[0] if default else None)[0].device_kind
    return default.device_kind


def vmem_bytes() -> int:
    """Vector memory of one TPU core; the smallest of them where the device is no TPU."""
    return VMEM_BYTES.get(device_kind(), LEAST_VMEM_BYTES)
