"""A writer that is meant to be killed: it says what it is about to do, does it, and says that it is done.

One process imports everything and forks a writer for each line it reads, so that a round costs no start-up.
"""

import json
import os
import random
import sys

import numpy as np

from popax.store import Catalog, Commit

USERS = [f"user-{index}" for index in range(12)]
# A deletion needs its next commits; commits are most of what a catalog sees.
OPERATIONS = {"commit": 4, "batch": 4, "promote": 3, "delete": 1, "prune": 1, "tag": 1, "gc": 1}


def adapter(value: int) -> dict:
    """One user's adapter, of 8 kB: every entry says which commit it is from."""
    return {"s": {"x": np.full(2000, value, np.int32)}}


def beside(value: int) -> dict | None:
    """Its optimizer's state: every other commit has one."""
    return {"mu": np.full(700, value, np.int32)} if value % 2 else None


def choose(catalog, rng: random.Random, value: int) -> dict | None:
    """The next operation, as a plain record; None where the catalog is not ready for the one that was drawn."""
    kind = rng.choices(list(OPERATIONS), list(OPERATIONS.values()))[0]
    if kind == "gc":
        return {"kind": kind}
    if kind in ("commit", "batch"):
        users = rng.sample(USERS, 1 if kind == "commit" else rng.randint(2, 8))
        return {"kind": kind, "users": users, "value": value}
    user = rng.choice(USERS)
    [record] = catalog.records([user])
    if record is None:
        return None
    operation = {"kind": kind, "user": user}
    if kind == "promote":
        return operation | {"revision": rng.randint(record.oldest, record.latest)}
    if kind == "tag":
        return operation | {"name": f"v{value}", "revision": record.latest}
    if kind == "prune":
        held = [record.latest, *record.tags.values(), *([record.promoted] if record.promoted else [])]
        return operation | {"before": min(held)}
    return operation


def perform(catalog, cohort, operation: dict) -> None:
    kind = operation["kind"]
    if kind in ("commit", "batch"):
        value = operation["value"]
        fields = {"metrics": {"value": value}, "optimizer": beside(value)}
        catalog.commit_batch(cohort, [Commit(user, adapter(value), **fields) for user in operation["users"]])
    elif kind == "promote":
        catalog.promote(operation["user"], operation["revision"])
    elif kind == "tag":
        catalog.tag(operation["user"], operation["name"], operation["revision"])
    elif kind == "delete":
        catalog.delete(operation["user"])
    elif kind == "prune":
        catalog.prune(operation["user"], before=operation["before"])
    else:
        catalog.gc(grace_s=0)


def say(record: dict) -> None:
    os.write(1, (json.dumps(record) + "\n").encode())


def work(place: str, generation: int) -> None:
    rng = random.Random(generation)
    catalog = Catalog.open(place)
    cohort = catalog.cohort_of(catalog.load("first")[1])
    for step in range(10_000):
        operation = choose(catalog, rng, generation * 10_000 + step)
        if operation is not None:
            say(operation)
            perform(catalog, cohort, operation)
            say({"done": True})


if __name__ == "__main__":
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            work(sys.argv[1], int(line))
        say({"pid": child})
        os.waitpid(child, 0)
        say({"dead": True})
