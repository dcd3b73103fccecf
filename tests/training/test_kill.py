"""Invariant 6 with a real SIGKILL: users through slots, killed 20 times (5 in CI), end where an unbroken run ends."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from popax.store.catalog import Catalog
from tests.sizes import size

CHILD = Path(__file__).with_name("kill_child.py")
KILLS = size(5, whole_size=20)


def start(place: Path) -> subprocess.Popen:
    command = [sys.executable, str(CHILD), str(place)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(place: Path) -> dict[str, list[tuple]]:
    catalog = Catalog.open(place / "catalog", read_only=True)
    return {
        record.user: [(m.revision, m.digest, tuple(sorted(m.metrics.items()))) for m in catalog.history(record.user)]
        for record in catalog.list()
    }


def kill_once(place: Path, dice: random.Random) -> bool:
    """Start, kill after some rounds and a random moment more; False where the run was done first."""
    child = start(place)
    assert child.stdout is not None
    for _ in range(dice.randint(1, 2)):
        line = child.stdout.readline()
        if not line.startswith("round"):
            output, errors = child.communicate()
            assert "done" in line + output, errors
            return False
    time.sleep(dice.uniform(0.0, 0.1))
    child.send_signal(signal.SIGKILL)
    child.communicate()
    return child.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_invariant_6_kills_change_no_bit_of_256_users(tmp_path):
    dice = random.Random(7)
    straight = start(tmp_path / "straight")
    output, errors = straight.communicate(timeout=300)
    assert "done" in output, errors
    kills = 0
    while kills < KILLS and kill_once(tmp_path / "killed", dice):
        kills += 1
    output, errors = start(tmp_path / "killed").communicate(timeout=300)
    assert "done" in output, errors
    assert kills == KILLS, f"the run ended after {kills} kills: give it more rounds"
    expected = contents(tmp_path / "straight")
    assert len(expected) == 256
    assert contents(tmp_path / "killed") == expected
    # A sample of them, each trained alone in a population of one.
    sys.path.insert(0, str(CHILD.parent))
    try:
        import kill_child
    finally:
        sys.path.pop(0)
    together = Catalog.open(tmp_path / "straight" / "catalog", read_only=True)
    for user in kill_child.users()[5::64]:
        alone = kill_child.run(tmp_path / user, slots=1, chosen=[user])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            alone.load(user)[0],
            together.load(user)[0],
        )
