"""Every test runs on CPU with 8 devices, strict dtypes and strict ranks."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile far more than they run: less optimisation halves their time, and changes no result they assert.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing that a test needs is downloaded

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# The first example of a shape compiles: a deadline would measure that.
hypothesis.settings.register_profile("popax", deadline=None)
hypothesis.settings.load_profile("popax")


@pytest.fixture
def key():
    return jax.random.key(0)
