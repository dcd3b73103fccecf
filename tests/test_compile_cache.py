"""The tests' own compile cache: keyed by what compiled, bounded, whole, and no help to a test that counts programs."""

import os
import subprocess
import sys
import textwrap
import time
import zlib

import pytest

from tests import compile_cache


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("POPAX_TESTS_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_the_place_is_outside_the_checkout_and_is_named_by_a_variable(place, monkeypatch, tmp_path):
    settings = compile_cache.settings({})
    assert settings["JAX_COMPILATION_CACHE_DIR"] == str(place / compile_cache.key())
    assert compile_cache.kept(settings)
    assert compile_cache.settings({"JAX_COMPILATION_CACHE_DIR": "mine"}) == {}
    assert not compile_cache.kept({"JAX_COMPILATION_CACHE_DIR": "mine"})
    monkeypatch.delenv("POPAX_TESTS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cache.root() == tmp_path / "popax" / "tests-compiled"


def test_a_home_that_cannot_be_written_is_no_reason_to_stop(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POPAX_TESTS_CACHE", str(tmp_path / "file"))
    settings = compile_cache.settings({})
    assert os.path.isdir(settings["JAX_COMPILATION_CACHE_DIR"])
    assert not compile_cache.kept(settings)


def test_another_cpu_or_other_flags_are_another_folder(monkeypatch):
    keys = {compile_cache.key(), compile_cache.key("flags: sse2"), compile_cache.key("flags: sse2 avx512f")}
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=1")
    assert len(keys | {compile_cache.key()}) == 4
    assert compile_cache.key() == compile_cache.key()


def test_tidying_removes_the_longest_unused_and_what_is_broken(place):
    now = time.time()
    for age, name in enumerate(("newest", "middle", "oldest")):
        path = place / "jax-0" / f"{name}-cache"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(zlib.compress(os.urandom(1000)))
        os.utime(path, (now - 100 * age - 100, now - 100 * age - 100))
    half = place / "jax-0" / "killed-cache"
    half.write_bytes(zlib.compress(os.urandom(1000))[:500])
    left = compile_cache.tidy(place, since=now - 10, largest_bytes=2100)
    assert sorted(path.name for path in place.rglob("*-cache")) == ["middle-cache", "newest-cache"]
    assert left == sum(path.stat().st_size for path in place.rglob("*-cache")) > 2000


COUNT = textwrap.dedent(
    """
    import jax, jax.numpy as jnp
    heard = []
    jax.monitoring.register_event_listener(lambda name, **_: heard.append(name))
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: heard.append(name))
    step = jax.jit(lambda x: jnp.sin(x) * 2)
    x, wide = jnp.zeros(3), jnp.zeros(5)
    heard.clear()
    for operand in (x, x, wide):
        step(operand)
    count = lambda end: sum(name.endswith(end) for name in heard)
    print(count("backend_compile_duration"), step._cache_size(), count("cache_hits"))
    """
)


def test_who_counts_compilations_counts_those_that_the_cache_answers(tmp_path):
    """Invariant 7 is asserted by jax's event and by a jitted function's size: both are the same with a warm cache."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    counts = [
        subprocess.run([sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert [count.stdout.split() for count in counts] == [["2", "2", "0"], ["2", "2", "2"]]
