"""SIGKILL at random instants: what was acknowledged is there, and what is there is whole."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np

from popax.store import Catalog, RowLayout

KILLS = 20

# One process imports everything and forks a writer for each round, so that a round costs no start-up. A writer
# acknowledges a commit on the pipe only after `commit` has returned.
NURSERY = """
import os, sys
import numpy as np
from popax.store import Catalog, Commit

def work(place, generation):
    catalog = Catalog.open(place)
    cohort = catalog.cohort_of(catalog.history("first")[0])
    for step in range(10_000):
        value = generation * 10_000 + step
        adapter = {"s": {"x": np.full(2000, value, np.int32)}}
        users = ["shared", f"own-{generation}"] if step % 3 else ["shared"]
        manifests = catalog.commit_batch(cohort, [Commit(user, adapter, metrics={"value": value}) for user in users])
        lines = [f"{manifest.revision} {manifest.user} {value}\\n" for manifest in manifests]
        os.write(1, "".join(lines).encode())

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        work(sys.argv[1], int(line))
    os.write(1, f"pid {child}\\n".encode())
    os.waitpid(child, 0)
    os.write(1, b"dead\\n")
"""


def _round(nursery, generation, delay):
    """Start a writer, kill it `delay` seconds after it was forked; returns what it acknowledged."""
    nursery.stdin.write(f"{generation}\n")
    nursery.stdin.flush()
    acknowledged = []
    for line in nursery.stdout:
        if line.startswith("pid "):
            time.sleep(delay)
            os.kill(int(line.split()[1]), signal.SIGKILL)
        elif line == "dead\n":
            return acknowledged
        else:
            revision, user, value = line.split()
            acknowledged.append((user, int(revision), int(value)))
    raise AssertionError(f"the nursery ended: {nursery.wait()}")


def test_nothing_acknowledged_is_lost_and_nothing_is_half_there(place, config, specs):
    """Invariant 6 for the catalog: killed 20 times, it is what it would have been without."""
    first = {"s": {"x": np.zeros(2000, np.int32)}}
    catalog = Catalog.open(place, create=True)
    cohort = catalog.cohort(config, specs, "base", RowLayout.of(first))
    catalog.commit(cohort, "first", first)
    rng, total, seen = random.Random(0), 0, {}
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-u", "-c", NURSERY, str(place)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as nursery:
        for generation in range(KILLS):
            acknowledged = _round(nursery, generation, rng.uniform(0.01, 0.25))
            total += len(acknowledged)
            opened = Catalog.open(place)
            for user, revision, value in acknowledged:
                adapter, manifest = opened.load(user, revision)
                assert manifest.metrics == {"value": value}
                assert (adapter["s"]["x"] == value).all()
            for record in opened.list():
                history = opened.history(record.user)
                assert [manifest.revision for manifest in history] == list(range(1, record.latest + 1))
                assert history[: len(seen.get(record.user, []))] == seen.get(record.user, [])
                for manifest in history[len(seen.get(record.user, [])) :]:
                    adapter, _ = opened.load(record.user, manifest.revision)
                    assert (adapter["s"]["x"] == manifest.metrics.get("value", 0)).all()
                seen[record.user] = history
            # A batch is there as a whole: a user's own revisions are those that it shares a commit with.
            shared = [manifest.metrics["value"] for manifest in seen.get("shared", [])]
            own = [manifest.metrics["value"] for manifest in seen.get(f"own-{generation}", [])]
            assert own == [value for value in shared if value // 10_000 == generation and value % 10_000 % 3]
        nursery.stdin.close()
    assert total > KILLS
