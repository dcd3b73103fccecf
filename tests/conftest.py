"""Every test runs on CPU with 8 devices, strict dtypes and strict ranks."""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

from tests.compile_flags import COMPILE_QUICKLY

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", COMPILE_QUICKLY]
)
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing that a test needs is downloaded
# Workers, and the processes that tests start, compile the same programs again and again: they share what one has made.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="popax-compiled-")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# The first example of a shape compiles: a deadline would measure that.
hypothesis.settings.register_profile("popax", deadline=None)
hypothesis.settings.load_profile("popax")


# Linux lets a process have 65,530 mappings, and every compiled program takes some: XLA crashes beyond.
MANY_MAPPINGS = 30_000


@pytest.fixture(scope="module", autouse=True)
def _programs_are_let_go():
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def key():
    return jax.random.key(0)
