"""SIGKILL at random instants: what was acknowledged is there, and what was not is there as a whole or not at all."""

import copy
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from popax.store import Catalog, Commit, RowLayout
from popax.store.manifest import PROMOTIONS
from tests.sizes import size
from tests.store.kill_child import adapter

CHILD = Path(__file__).with_name("kill_child.py")


@dataclasses.dataclass
class User:
    """What a user should be: the value of each revision, by its number."""

    values: dict[int, int] = dataclasses.field(default_factory=dict)
    promotions: list[int] = dataclasses.field(default_factory=list)
    tags: dict[str, int] = dataclasses.field(default_factory=dict)


class Model:
    """The catalog as a dictionary: what operations mean, without a store."""

    def __init__(self):
        self.users = {"first": User({1: 0})}

    def apply(self, operation):
        kind = operation["kind"]
        for name in operation.get("users", []):
            user = self.users.setdefault(name, User())
            user.values[max(user.values, default=0) + 1] = operation["value"]
        if kind == "delete":
            del self.users[operation["user"]]
        elif kind == "promote":
            user = self.users[operation["user"]]
            if user.promotions[-1:] != [operation["revision"]]:
                user.promotions = [*user.promotions, operation["revision"]][-PROMOTIONS:]
        elif kind == "tag":
            self.users[operation["user"]].tags[operation["name"]] = operation["revision"]
        elif kind == "prune":
            user = self.users[operation["user"]]
            user.values = {at: value for at, value in user.values.items() if at >= operation["before"]}
            user.promotions = [at for at in user.promotions if at >= operation["before"]]

    def after(self, operation):
        changed = copy.deepcopy(self)
        if operation is not None:
            changed.apply(operation)
        return changed


def _found(catalog):
    """The catalog's state as a Model's users; the values are those of the rows themselves."""
    users = {}
    for record in catalog.list():
        history = catalog.history(record.user)
        values = {manifest.revision: manifest.metrics.get("value", 0) for manifest in history}
        users[record.user] = User(values, list(record.promotions), dict(record.tags))
        latest, manifest = catalog.load(record.user)
        assert (latest["s"]["x"] == values[record.latest]).all()
        assert (manifest.optimizer is not None) == bool(values[record.latest] % 2)
        if manifest.optimizer is not None:
            assert (catalog.load_optimizer(manifest)["mu"] == values[record.latest]).all()
    return users


def _round(nursery, model, generation, delay):
    """Start a writer and kill it after `delay` seconds; returns what it had begun and not acknowledged."""
    nursery.stdin.write(f"{generation}\n")
    nursery.stdin.flush()
    begun, acknowledged = None, 0
    for line in nursery.stdout:
        said = json.loads(line)
        if "pid" in said:
            time.sleep(delay)
            os.kill(said["pid"], signal.SIGKILL)
        elif "dead" in said:
            return begun, acknowledged
        elif "done" in said:
            model.apply(begun)
            begun, acknowledged = None, acknowledged + 1
        else:
            begun = said
    raise AssertionError(f"the nursery ended: {nursery.wait()}")


def _killed(place, config, specs, kills):
    first = adapter(0)
    catalog = Catalog.open(place, create=True)
    cohort = catalog.cohort(config, specs, "base", RowLayout.of(first))
    catalog.commit(cohort, "first", first)
    rng, model, total, interrupted = random.Random(0), Model(), 0, set()
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [sys.executable, "-u", str(CHILD), str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as nursery:
        for generation in range(kills):
            begun, acknowledged = _round(nursery, model, generation, rng.uniform(0.01, 0.25))
            total += acknowledged
            opened = Catalog.open(place)
            found = _found(opened)
            if found != model.users:
                # The operation under way was carried out, as a whole, and only its acknowledgement was lost.
                model = model.after(begun)
                assert found == model.users, begun
            if begun is not None:
                interrupted.add(begun["kind"])
            audit = opened.verify()
            assert audit.clean, audit.problems
            values = [value for user in model.users.values() for value in user.values.values()]
            assert audit.rows == len(values)
            assert audit.optimizer_states == sum(value % 2 for value in values)
        nursery.stdin.close()
    assert total > kills
    return model, interrupted


def _files(place):
    return b"".join(path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file())


def test_nothing_acknowledged_is_lost_and_nothing_is_half_there(place, config, specs):
    """Invariant 6 for the catalog: killed 15 times, it is what it would have been without."""
    _killed(place, config, specs, 15)


def test_what_a_killed_writer_left_beside_the_manifest_is_not_taken_over(place, config, specs):
    """A file longer than the next manifest, under the name that TensorStore writes to: seen after a kill."""
    catalog = Catalog.open(place, create=True)
    cohort = catalog.cohort(config, specs, "base", RowLayout.of(adapter(0)))
    for left in (place / "shard_00000" / "manifest.ocdbt.__lock", place / "popax_catalog.json.__lock"):
        left.write_bytes(b"x" * 100_000)
    catalog.commit(cohort, "first", adapter(1))
    staged = catalog.stage_batch(cohort, [Commit("second", adapter(2))], shard=1)
    (place / "popax_catalog.json.__lock").write_bytes(b"x" * 100_000)
    catalog.publish(cohort, staged, shards=2)
    assert [record.user for record in Catalog.open(place).list()] == ["first", "second"]


@pytest.mark.slow
def test_hundreds_of_kills_leave_no_orphan(place, config, specs):
    """Commits, batches, promotions, deletions, prunings and gc, killed 300 times (60 in CI) at random instants."""
    model, interrupted = _killed(place, config, specs, size(60, whole_size=300))
    assert {"commit", "batch", "promote", "delete", "gc"} <= interrupted
    catalog = Catalog.open(place)
    catalog.gc(grace_s=0)
    audit = catalog.verify()
    assert audit.clean
    assert (audit.orphan_rows, audit.orphan_records) == (0, 0)
    assert _found(catalog) == model.users
    # No orphan bytes: what is on disk is what is named, and the tree that leads to it.
    named = sum(len(user.values) for user in model.users.values()) * 8064
    assert len(_files(place)) < 1.5 * named + 200_000
