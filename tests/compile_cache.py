"""Where the tests keep compiled programs between runs: compiling is most of their time, and the same each time.

POPAX_TESTS_CACHE names another place; JAX_COMPILATION_CACHE_DIR, where it is set, is jax's own and nothing here looks
after it. Several runs and their workers may use the place at once: an entry is written once, and a reader who meets a
broken or vanished one compiles.
"""

import atexit
import hashlib
import importlib.metadata
import os
import platform
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

LARGEST_BYTES = 2 << 30


def root() -> Path:
    if chosen := os.environ.get("POPAX_TESTS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "popax" / "tests-compiled"


def key(cpu: str | None = None) -> str:
    """A folder's name: jax has its own key for a program and its flags, but machine code of another CPU may crash."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib")]
    parts = [*versions, os.environ.get("XLA_FLAGS", ""), cpu_features() if cpu is None else cpu]
    return f"jax-{importlib.metadata.version('jax')}-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:16]}"


def cpu_features() -> str:
    """What LLVM may choose instructions by; every core has the same lines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    named = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    chosen = {line for line in lines if line.partition(":")[0].strip() in named}
    return "\n".join([platform.machine(), *sorted(chosen or lines[:1])])


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What has this process, its workers and what they start keep compiled programs; after XLA_FLAGS is set."""
    if "JAX_COMPILATION_CACHE_DIR" in environment:
        return {}
    place = root() / key()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:  # no home that can be written: kept for this run alone
        place = Path(tempfile.mkdtemp(prefix="popax-compiled-"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
    # Reading an entry takes less than compiling the smallest program does.
    return {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_COMPILATION_CACHE_DIR": str(place)}


def kept(environment: Mapping[str, str]) -> bool:
    """Whether compiled programs go where `tidy` may look after them."""
    return Path(environment.get("JAX_COMPILATION_CACHE_DIR", "")).is_relative_to(root())


def tidy(place: Path, *, since: float, largest_bytes: int = LARGEST_BYTES) -> int:
    """Removes what was written since `since` and is broken, then the longest unused entries beyond the bound.

    Returns the bytes that are left. An entry is written in place: a test that kills a process may leave half of one.
    """
    entries = []
    for path in place.rglob("*"):
        try:
            stat = path.stat()
            if not path.is_file():
                continue
            if stat.st_mtime >= since and _broken(path):
                path.unlink()
                continue
        except FileNotFoundError:  # another run tidies too
            continue
        entries.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    left = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if left <= largest_bytes:
            break
        path.unlink(missing_ok=True)
        left -= size
    return left


def _broken(path: Path) -> bool:
    """Whether a program that jax packed with zlib does not unpack; what is packed otherwise is not looked into."""
    packed = path.read_bytes()
    if not path.name.endswith("-cache") or not packed.startswith(b"\x78"):
        return not packed
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(packed)
    except zlib.error:
        return True
    return not unpacking.eof
