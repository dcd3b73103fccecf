"""What was deleted is in no file after `gc`, what is alive is untouched, and nobody has to stop for it."""

import contextlib
import os
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
import tensorstore as ts

from popax.errors import ConflictError, CorruptRevisionError
from popax.store import Catalog, Commit
from popax.store.database import Database
from popax.store.packed import unseal_user
from popax.store.records import BrokenRecordError, row_key, unseal, user_hash
from popax.store.tree import Leaf, walk

USERS = [f"user-{index}" for index in range(60)]


def _fill(catalog, cohort, make_adapter, turns=2):
    for turn in range(turns):
        catalog.commit_batch(cohort, [Commit(user, make_adapter(turn * 100 + at)) for at, user in enumerate(USERS)])


def _file_bytes(place):
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def _contents(place):
    """Everything that is in the catalog's files: as it lies there, and each node and record as its reader sees it."""
    parts = list(_file_bytes(place).values())
    database = Database.open(place, create=False)
    for shard in range(database.shard_count()):
        base = database.base(shard)
        for node in walk(base):
            if isinstance(node, Leaf):
                for key in node.keys:
                    value = database.shard(shard).read(key).result().value
                    parts.append(key + b"\0" + value)
                    # A record is deflated after its check; a user's, or a revision's, after its fixed fields as well.
                    with contextlib.suppress(BrokenRecordError, UnicodeDecodeError, struct.error, zlib.error):
                        parts.append(repr(dict(unseal_user(value)["manifest"])).encode())
                    with contextlib.suppress(BrokenRecordError, zlib.error):
                        parts.append(repr(unseal(value)).encode())
    return b"\n".join(parts)


def test_no_byte_of_a_deleted_user_is_left(catalog, cohort, make_adapter, layout, place, same):
    """Invariant 8: rows, manifests, tags, optimizer states, in live and dead parts of files alike."""
    _fill(catalog, cohort, make_adapter)
    secret = make_adapter(777)
    for _ in range(2):
        catalog.commit(cohort, "ada", secret, metrics={"loss": 0.123456789}, optimizer={"mu": np.full(40, 7.5)})
    catalog.tag("ada", "private-tag")
    row = layout.pack(secret).tobytes()
    before = _contents(place)
    assert row in before
    assert b"0.123456789" in before
    catalog.delete("ada")
    # Deleted, and still in the files.
    assert row in b"".join(_file_bytes(place).values())
    collected = catalog.gc(grace_s=0)
    assert collected.bytes_removed > 0
    after = _contents(place)
    for piece in (row[at : at + 32] for at in range(0, len(row) - 32, 32)):
        assert piece == bytes(32) or piece not in after
    for secret_text in (b"0.123456789", b"private-tag", user_hash("ada").encode(), np.full(4, 7.5).tobytes()):
        assert secret_text not in after
    for at, user in enumerate(USERS):
        same(catalog.load(user, 1)[0], make_adapter(at))
        same(Catalog.open(place).load(user)[0], make_adapter(100 + at))
    assert catalog.verify().clean


def test_afterwards_a_few_nodes_of_its_own_are_dead(catalog, cohort, make_adapter, place):
    _fill(catalog, cohort, make_adapter, turns=4)
    for user in USERS[::3]:
        catalog.delete(user)
    for user in USERS[1::3]:
        catalog.prune(user, before=3)
    before = sum(Database.open(place, create=False).data_files(0).values())
    collected = catalog.gc(grace_s=0)
    database = Database.open(place, create=False)
    files, live, leaf_files = database.data_files(0), {}, set()
    for node in walk(database.base(0)):
        values = [piece for _, piece in node.values] if isinstance(node, Leaf) else []
        for piece in [node.place, *values]:
            live[piece.file] = live.get(piece.file, 0) + piece.bytes
        leaf_files |= {node.place.file} if isinstance(node, Leaf) else set()
    # Each file holds something that is reached; rows fill theirs, and beside nodes lie a few that were replaced.
    assert set(live) == set(files)
    assert all(live[name] == size for name, size in files.items() if name.startswith("v/"))
    assert sum(files[name] - live[name] for name in leaf_files) < 4000
    assert collected.bytes_left == sum(files.values()) < before / 2
    assert collected.bytes_dead == sum(files.values()) - sum(live.values())
    again = catalog.gc(grace_s=0)
    assert again.bytes_rewritten < 0.1 * collected.bytes_left
    assert sum(database.data_files(0).values()) <= 1.02 * collected.bytes_left


def test_the_walk_finds_what_tensorstore_lists(catalog, cohort, make_adapter, place):
    _fill(catalog, cohort, make_adapter, turns=3)
    database = Database.open(place, create=False)
    leaves = [node for node in walk(database.base(0)) if isinstance(node, Leaf)]
    assert len(leaves) > 1
    assert sorted(key for leaf in leaves for key in leaf.keys) == sorted(database.kvstore.list().result())
    apart = dict(pair for leaf in leaves for pair in leaf.values)
    rows = [row_key(cohort.id, index).encode() for index in range(180)]
    assert set(rows) <= set(apart)
    assert {apart[row].bytes for row in rows} == {cohort.layout.row_bytes}


def test_a_larger_lot_takes_several_transactions(catalog, cohort, make_adapter, monkeypatch, same):
    monkeypatch.setattr("popax.store.gc.REWRITE_BYTES", 20_000)
    _fill(catalog, cohort, make_adapter, turns=3)
    for user in USERS[::2]:
        catalog.delete(user)
    collected = catalog.gc(grace_s=0)
    # Inner nodes that one transaction replaced of the one before.
    assert collected.bytes_dead < 0.02 * collected.bytes_left
    for at, user in enumerate(USERS[1::2]):
        same(catalog.load(user, 2)[0], make_adapter(100 + 2 * at + 1))
    assert catalog.verify().clean


def test_staged_rows_wait_for_the_grace_period(catalog, cohort, make_adapter, same, monkeypatch):
    _fill(catalog, cohort, make_adapter, turns=1)
    lost = catalog.stage_batch(cohort, [Commit("lost", make_adapter(1))], shard=1)
    late = catalog.stage_batch(cohort, [Commit("late", make_adapter(2))], shard=2)
    catalog.publish(cohort, catalog.stage_batch(cohort, [Commit("kept", make_adapter(3))], shard=2), shards=3)
    assert (lost[0].shard, late[0].shard) == (1, 2)
    first = catalog.gc(grace_s=100)
    assert (first.rows_removed, first.rows_waiting) == (0, 2)
    assert catalog.gc(grace_s=100).rows_removed == 0
    catalog.publish(cohort, late, shards=3)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 101)
    assert catalog.gc(grace_s=100).rows_removed == 1
    same(catalog.load("late")[0], make_adapter(2))
    same(catalog.load("kept")[0], make_adapter(3))
    audit = catalog.verify()
    assert audit.clean
    assert audit.orphan_rows == 0


def test_rows_of_a_broken_record_are_never_taken_for_garbage(catalog, cohort, make_adapter, place):
    _fill(catalog, cohort, make_adapter, turns=1)
    store = Database.open(place, create=False).kvstore
    store.write(f"user/{user_hash('user-3')}", b"broken").result()
    with pytest.raises(CorruptRevisionError, match=user_hash("user-3")):
        catalog.gc(grace_s=0)


def test_half_written_files_of_a_killed_writer_go(catalog, cohort, make_adapter, place):
    _fill(catalog, cohort, make_adapter, turns=1)
    left = [place / "shard_00000" / name for name in ("v/0123456789abcdef0123456789abcdef.__lock", "n/" + "0" * 32)]
    for path in left:
        path.write_bytes(b"bytes of nobody")
    assert catalog.gc(grace_s=0).files_removed >= 2
    assert not any(path.exists() for path in left)


def test_two_collectors_do_not_run_at_once(catalog, cohort, make_adapter, place):
    _fill(catalog, cohort, make_adapter, turns=1)
    with Database.open(place, create=False).locks.collecting(), pytest.raises(ConflictError, match="another gc"):
        catalog.gc()
    catalog.gc()


WRITER = """
import sys
from popax.store import Catalog, Commit
catalog = Catalog.open(sys.argv[1])
adapter, manifest = catalog.load("user-0")
cohort = catalog.cohort_of(manifest)
print("ready", flush=True)
for turn in range(40):
    catalog.commit_batch(cohort, [Commit(f"child-{turn}-{n}", adapter) for n in range(5)])
    catalog.commit(cohort, "user-1", adapter, metrics={"turn": turn})
    if turn:
        catalog.delete(f"child-{turn - 1}-0")
"""


def test_readers_and_writers_go_on(catalog, cohort, make_adapter, place, same):
    """A writer in another process, two readers here, and gc after gc: nobody fails, nobody sees anything half-there."""
    _fill(catalog, cohort, make_adapter)
    catalog.commit(cohort, "user-0", make_adapter(5000))
    failures, stop, reads = [], threading.Event(), [0]

    def read():
        reader = Catalog.open(place, read_only=True)
        try:
            while not stop.is_set():
                for at, (adapter, _) in enumerate(reader.load_batch(USERS[2:20])):
                    same(adapter, make_adapter(100 + at + 2))
                assert reader.history("user-1")[0].revision == 1
                reads[0] += 1
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    command = [sys.executable, "-c", WRITER, str(place)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as writer:
        assert writer.stdout.readline() == "ready\n"
        for reader in readers:
            reader.start()
        rounds = 0
        while writer.poll() is None or rounds < 3:
            catalog.gc(grace_s=0)
            rounds += 1
    stop.set()
    for reader in readers:
        reader.join()
    assert writer.returncode == 0
    assert not failures
    assert min(rounds, reads[0]) >= 3
    assert catalog.load("user-1")[1].metrics == {"turn": 39}
    assert sum(record.user.startswith("child-") for record in catalog.list()) == 200 - 39
    assert catalog.verify().clean


def test_a_catalog_in_memory_has_its_grace_period_for_files(config, specs, layout, make_adapter, monkeypatch):
    """Where there are no locks, what is on the first gc's list and reached by nothing goes with a later one."""
    catalog = Catalog.open("memory://", create=True, context=ts.Context())
    cohort = catalog.cohort(config, specs, "base", layout)
    _fill(catalog, cohort, make_adapter)
    row = layout.pack(make_adapter(777)).tobytes()
    catalog.commit(cohort, "ada", make_adapter(777))
    catalog.delete("ada")
    base = catalog._database.base(0)
    everything = lambda: b"".join(base.read(key).result().value for key in base.list().result())  # noqa: E731
    first = catalog.gc(grace_s=100)
    assert first.files_removed == 0
    assert first.files_waiting > 0
    assert row in everything()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 101)
    assert catalog.gc(grace_s=100).files_removed > 0
    assert row not in everything()
    assert catalog.verify().clean
