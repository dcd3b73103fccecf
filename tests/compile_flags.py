"""Flags of XLA's compiler for the CPU, the same in every process of a test: other flags are other bits."""

# Tests compile far more than they run: less optimisation, and no emitters of fusions, make them take a third of their
# time, and change no result they assert.
COMPILE_QUICKLY = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)
