"""XLA ends a process over a flag that it does not know: the installed one knows every flag that is set here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import compile_flags

ROOT = Path(__file__).parents[1]
FLAG = re.compile(r"--xla_\w+=\w+")
TABLE = ROOT / "tests" / "compile_flags.py"  # also names flags that other versions know


def flags_set() -> set[str]:
    """What tests, the package and the launchers give XLA, in this process or in one that they start."""
    found = set(compile_flags.COMPILE_QUICKLY.split())
    for folder in ("tests", "popax", "kernels", "launch"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".sh") and path not in (TABLE, Path(__file__)):
                found.update(FLAG.findall(path.read_text(encoding="utf-8")))
    return found


def ends(flags: set[str]) -> tuple[int, str]:
    """(exit code, stderr) of a process that starts XLA with these flags."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(sorted(flags))}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_the_installed_xla_knows_every_flag():
    flags = flags_set()
    assert any("device_count" in flag for flag in flags)
    assert ends(flags) == (0, "")


def test_an_unknown_flag_ends_the_process():
    code, message = ends({"--xla_no_such_flag=1"})
    assert code != 0
    assert "--xla_no_such_flag=1" in message


@pytest.mark.parametrize(
    ("jaxlib", "known"), [("0.10.0", True), ("0.11.0", True), ("0.11.1", False), ("0.12.0.1", False)]
)
def test_a_flag_is_set_for_the_versions_that_know_it(jaxlib, known):
    flags = compile_flags.known_flags(jaxlib)
    assert ("--xla_cpu_use_fusion_emitters=false" in flags) == known
    assert "--xla_backend_optimization_level=0" in flags
