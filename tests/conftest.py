"""Every test runs on CPU with 8 devices, strict dtypes and strict ranks."""

import gc
import os
import time
from pathlib import Path

from tests import compile_cache
from tests.compile_flags import COMPILE_QUICKLY, EIGHT_DEVICES, with_flags
from tests.slow_tests import slow_tests

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = with_flags(os.environ.get("XLA_FLAGS", ""), f"{EIGHT_DEVICES} {COMPILE_QUICKLY}")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing that a test needs is downloaded
# Workers, and the processes that tests start, compile the same programs again and again, as the next run will.
os.environ.update(compile_cache.settings(os.environ))

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# The first example of a shape compiles: a deadline would measure that.
hypothesis.settings.register_profile("popax", deadline=None)
hypothesis.settings.load_profile("popax")


STARTED = time.time()
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Before `-m` chooses."""
    if config.getoption("write_slow", default=False):
        return
    names = slow_tests()
    for item in items:
        if item.nodeid in names:
            item.add_marker("slow")


LEFT_OUT = pytest.StashKey[int]()


def pytest_deselected(items):
    """How many kernel tests `-m 'not kernels'` has left out, of those that would have run without it."""
    if items and "not kernels" in (config := items[0].config).getoption("markexpr"):
        left = sum("kernels" in item.keywords and "slow" not in item.keywords for item in items)
        config.stash[LEFT_OUT] = config.stash.get(LEFT_OUT, 0) + left


def pytest_sessionfinish(session):
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = config.stash.get(LEFT_OUT, 0)
    elif compile_cache.kept(os.environ):
        compile_cache.tidy(compile_cache.root(), since=STARTED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Each worker collects everything: one's count is everyone's."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter):
    if left := terminalreporter.config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{left} kernel tests were left out: make test-kernels runs them, as CI does.")
