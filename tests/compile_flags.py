"""Flags of XLA's compiler for the CPU, the same in every process of a test: other flags are other bits.

The one place where tests name a flag that not every supported jaxlib knows: XLA ends the process over an unknown one.
"""

from importlib.metadata import version

# Tests compile far more than they run: less optimisation, no emitters of fusions, and no program split into parts that
# are compiled apart (small ones cost more so) make them take a quarter of their time, and change no result they assert.
# Beside each flag the jaxlib from which on XLA no longer knows it.
QUICKLY = {
    "--xla_backend_optimization_level=0": None,
    "--xla_llvm_disable_expensive_passes=true": None,
    "--xla_cpu_use_fusion_emitters=false": (0, 11, 1),
    "--xla_cpu_parallel_codegen_split_count=1": None,
}


def known_flags(jaxlib: str) -> str:
    """Those of QUICKLY that the XLA of this jaxlib ("0.12.0.1") knows, as XLA_FLAGS holds them."""
    release = tuple(int(part) for part in jaxlib.split(".")[:3])
    return " ".join(flag for flag, gone in QUICKLY.items() if gone is None or release < gone)


COMPILE_QUICKLY = known_flags(version("jaxlib"))
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"


def with_flags(flags: str, more: str) -> str:
    """Each flag once: a worker is started with what the first process has set, and other flags are other programs."""
    return " ".join(dict.fromkeys([*flags.split(), *more.split()]))
