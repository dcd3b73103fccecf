"""From names to slots: everybody gets their own, one load is enough for all, and nothing is compiled on the way."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from popax.errors import (
    BaseMismatchError,
    ConflictError,
    CorruptRevisionError,
    PopulationError,
    ResidencyTimeoutError,
    RevisionNotFoundError,
    StorageError,
)
from popax.residency import Request, Residency
from popax.residency.slab import CHUNKS, Slab
from popax.store import Catalog, Commit
from popax.store.database import Database
from popax.store.records import row_key
from tests.residency.conftest import COHORT, USERS, adapter


def _values(residency, lease):
    """The number in each leased slot: every leaf of it must hold that number only."""
    found = []
    with residency.bound(lease):
        for slot in lease.slots:
            parts = [residency.adapters["lm_head"][leaf][slot] for leaf in ("a", "b")]
            parts += [residency.adapters["layers.attn.q_proj"][leaf][:, slot] for leaf in ("a", "b")]
            values = {float(value) for part in parts for value in np.unique(np.asarray(part))}
            assert len(values) == 1
            found.append(values.pop())
    return found


def _requests(*numbers):
    return [Request(USERS[number]) for number in numbers]


@pytest.fixture
def residency(catalog, stored):
    with Residency(catalog, stored, slots=8) as made:
        yield made


def test_everybody_gets_their_own(residency):
    rng = np.random.default_rng(0)
    for _ in range(60):
        numbers = rng.integers(len(USERS), size=rng.integers(1, 9)).tolist()
        with residency.lease([*_requests(*numbers), Request(None)]) as lease:
            assert lease.slots[-1] == -1
            assert lease.manifests[-1] is None
            assert [one.user for one in lease.manifests[:-1]] == [USERS[number] for number in numbers]
            assert _values(residency, lease)[:-1] == numbers
    counted = residency.counters()
    assert counted.device.evictions > 0
    assert (
        counted.device.hits + counted.device.misses
        == counted.device.bytes_in // residency.stored.layout.row_bytes + counted.device.hits
    )
    assert counted.catalog.loads == counted.host.misses - counted.catalog.coalesced


def test_who_is_resident_changes_and_nothing_compiles(residency):
    """Invariant 7."""
    with residency.lease(_requests(0, 1)) as lease:
        _values(residency, lease)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    try:
        for at in range(0, 160, 8):
            with residency.lease(_requests(*range(at, at + 1 + at % 8))):
                pass
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [name for name in compiled if "compile" in name]
    assert residency.counters().device_updates >= 20


def test_an_update_writes_in_place():
    """The program's own text: every slot array that goes in comes out as the same buffer."""
    from popax.store.layout import RowLayout

    layout = RowLayout.of(COHORT.abstract())
    slab = Slab(COHORT, layout, 16)
    for chunk in CHUNKS[:3]:
        text = slab.compiled(chunk).as_text()
        aliases = text.split("input_output_alias=", 1)[1].split("\n", 1)[0]
        assert aliases.count("may-alias") + aliases.count("must-alias") == len(jax.tree.leaves(slab.arrays))
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(slab.arrays)]
    slab.write([3, 5], [layout.pack(adapter(7)), layout.pack(adapter(9))])
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(slab.arrays)] == before


def test_slots_lie_on_a_mesh(catalog, stored):
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("population",)), PartitionSpec())
    with Residency(catalog, stored, slots=8, sharding=sharding) as residency:
        for at in range(0, 40, 5):
            with residency.lease(_requests(*range(at, at + 5))) as lease:
                assert _values(residency, lease) == list(range(at, at + 5))
        assert {leaf.sharding for leaf in jax.tree.leaves(residency.adapters)} == {sharding}


def test_a_thousand_requests_for_one_cold_user_are_one_load(catalog, stored):
    read = []
    original = catalog.read_rows
    gate = threading.Event()

    def slow(manifests):
        gate.wait()
        read.append(len(manifests))
        return original(manifests)

    catalog.read_rows = slow
    with Residency(catalog, stored, slots=4) as residency:
        with residency.lease([]):
            pass
        threads = [threading.Thread(target=residency.prefetch, args=(_requests(5),)) for _ in range(100)]
        for thread in threads:
            thread.start()
        for _ in range(900):
            residency.prefetch(_requests(5))
        for thread in threads:
            thread.join()
        gate.set()
        with residency.lease(_requests(5)) as lease:
            assert _values(residency, lease) == [5]
    assert read == [1]


def test_cold_users_are_read_together(catalog, stored):
    """256 at once: a first batch of whoever was first, and one more for all that gathered meanwhile."""
    read = []
    original = catalog.read_rows

    def counted(manifests):
        read.append(len(manifests))
        return original(manifests)

    catalog.read_rows = counted
    with Residency(catalog, stored, slots=256) as residency:
        with residency.lease(_requests(*range(256))) as lease:
            assert _values(residency, lease)[::17] == list(range(256))[::17]
        assert sum(read) == 256
        assert len(read) <= 16


def test_a_broken_revision_is_the_error_of_those_who_want_it(filled, catalog, stored, tmp_path):
    manifest = catalog.load("user-7")[1]
    store = Database.open(filled, create=False).kvstore
    key = row_key(manifest.cohort, manifest.row)
    good = store.read(key).result().value
    store.write(key, b"broken").result()
    try:
        with Residency(catalog, stored, slots=8) as residency:
            with pytest.raises(CorruptRevisionError, match="'user-7'@1"), residency.lease(_requests(6, 7, 8)):
                pass
            # The others of the batch are there, and no slot is lost.
            before = residency.counters().catalog.loads
            with residency.lease(_requests(6, 8)) as lease:
                assert _values(residency, lease) == [6, 8]
            assert residency.counters().catalog.loads == before
            store.write(key, good).result()
            with residency.lease(_requests(0, 1, 2, 3, 4, 5, 6, 7)) as lease:
                assert _values(residency, lease) == list(range(8))
    finally:
        store.write(key, good).result()


def test_who_waits_for_a_failed_arrival_gets_its_error(catalog, stored):
    """One lease brings user 7 in and fails while another, which wants user 7 too, still reads user 8."""
    original, asked, failed = catalog.read_rows, threading.Event(), threading.Event()

    def read(manifests):
        if [manifest.user for manifest in manifests] == ["user-7"]:
            assert asked.wait(10)
            raise CorruptRevisionError("'user-7'@1")
        assert failed.wait(10)
        return original(manifests)

    catalog.read_rows = read
    errors = []

    def ask(*numbers):
        try:
            with residency.lease(_requests(*numbers)):
                pass
        except BaseException as error:
            errors.append(error)

    with Residency(catalog, stored, slots=8) as residency:
        first, second = threading.Thread(target=ask, args=(7,)), threading.Thread(target=ask, args=(7, 8))
        first.start()
        while residency.counters().catalog.batches < 1:
            time.sleep(0.001)
        second.start()
        while residency.counters().host.misses < 2:
            time.sleep(0.001)
        asked.set()
        first.join(10)
        failed.set()
        second.join(10)
        assert [type(error) for error in errors] == [CorruptRevisionError] * 2
        with residency.lease(_requests(*range(10, 18))) as lease:
            assert _values(residency, lease) == list(range(10, 18))


def test_a_broken_row_costs_the_others_few_reads(catalog, stored):
    """256 rows, one broken by an error that no one foresaw: halving takes at most 2 log2(256) + 1 reads a batch."""
    original, reads = catalog.read_rows, []

    def read(manifests):
        reads.append(len(manifests))
        if any(manifest.user == "user-100" for manifest in manifests):
            raise RuntimeError("unforeseen")
        return original(manifests)

    catalog.read_rows = read
    with Residency(catalog, stored, slots=256) as residency:
        with pytest.raises(RuntimeError, match="unforeseen"), residency.lease(_requests(*range(256))):
            pass
        assert len(reads) <= 17
        with residency.lease(_requests(*range(100), *range(101, 256))) as lease:
            assert _values(residency, lease)[98:102] == [98, 99, 101, 102]
        counted = residency.counters().catalog
        assert (counted.loads, counted.failed) == (255, 1)


def test_who_has_a_slot_is_not_read_ahead(catalog, stored):
    with Residency(catalog, stored, slots=4, host_bytes=0) as residency:
        with residency.lease(_requests(1, 2)):
            residency.prefetch(_requests(1, 2))
        residency.prefetch(_requests(2))
        assert residency.counters().catalog.loads == 2
        assert residency.counters().host.misses == 2


def test_what_cannot_be_asked_for_is_named(residency, catalog, stored):
    for requests, error, words in (
        (_requests(*range(9)), PopulationError, "9 adapters in one request, 8 device slots"),
        ([Request("eve")], RevisionNotFoundError, "'eve' has no revision"),
        ([Request("user-1", 2)], RevisionNotFoundError, "no revision 2"),
        ([Request("user-1", "promoted")], RevisionNotFoundError, "no promoted revision"),
    ):
        with pytest.raises(error, match=words), residency.lease(requests):
            pass
    other = catalog.cohort(COHORT.config, COHORT.specs, "another base", stored.layout)
    catalog.commit(other, "stranger", adapter(1))
    try:
        with pytest.raises(BaseMismatchError, match="another base"), residency.lease([Request("stranger")]):
            pass
    finally:
        catalog.delete("stranger")
    with pytest.raises(PopulationError, match="at least 1"):
        Residency(catalog, stored, slots=0)


def test_leases_wait_their_turn(residency):
    """All slots held: the next waits, a later small one does not overtake it, and a time-out says what is held."""
    order, inside = [], threading.Event()

    def hold(name, numbers):
        with residency.lease(_requests(*numbers)):
            order.append(name)
            inside.set()

    def waiting(name, numbers, waits):
        thread = threading.Thread(target=hold, args=(name, numbers))
        thread.start()
        while residency.counters().waits < waits:
            time.sleep(0.001)
        return thread

    late = residency.lease(_requests(10, 11, 12), timeout_s=0.05)
    with residency.lease(_requests(*range(6))):
        with pytest.raises(ResidencyTimeoutError, match="2 of 8 slots are free, 0 requests wait beside"):
            late.__enter__()
        threads = [waiting("big", range(10, 18), 2), waiting("small", [20], 3)]
        assert not inside.is_set()
    for thread in threads:
        thread.join(10)
    assert order == ["big", "small"]


def test_many_threads_at_once_get_their_own(residency):
    failures = []

    def work(seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(25):
                numbers = rng.integers(60, size=rng.integers(1, 6)).tolist()
                with residency.lease(_requests(*numbers)) as lease:
                    assert _values(residency, lease) == numbers
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_new_revision_is_what_the_next_lease_gets(catalog, stored, filled):
    with Residency(catalog, stored, slots=4) as residency:
        catalog.commit(stored, "renewed", adapter(1000))
        with residency.lease([Request("renewed")]) as lease:
            assert _values(residency, lease) == [1000]
        written = residency.write_back(Commit("renewed", adapter(1001)))
        residency.flush()
        assert written.result().revision == 2
        loads = residency.counters().catalog.loads
        with residency.lease([Request("renewed"), Request("renewed", 1)]) as lease:
            assert _values(residency, lease) == [1001, 1000]
        # What was written back was still in the host tier.
        assert residency.counters().catalog.loads == loads
        # Deleted and begun anew under the same name and number: other bytes, another identity.
        Catalog.open(filled).delete("renewed")
        catalog.commit(stored, "renewed", adapter(1002))
        with residency.lease([Request("renewed", 1)]) as lease:
            assert _values(residency, lease) == [1002]
        catalog.delete("renewed")


def test_a_refused_commit_is_told_and_the_others_are_durable(catalog, stored, filled):
    with Residency(catalog, stored, slots=4) as residency:
        good = [residency.write_back(Commit(f"new-{at}", adapter(at))) for at in range(5)]
        bad = residency.write_back(Commit("user-1", adapter(1), parent=9))
        with pytest.raises(ConflictError, match="user-1"):
            residency.flush()
        with pytest.raises(ConflictError, match="user-1"):
            bad.result()
        residency.flush()
        assert [one.result().revision for one in good] == [1] * 5
        with pytest.raises(PopulationError, match="does not fit"):
            residency.write_back(Commit("x", {"no": {"site": jnp.zeros(1)}}))
    reader = Catalog.open(filled)
    for at in range(5):
        assert (reader.load(f"new-{at}")[0]["lm_head"]["a"] == at).all()
        reader.delete(f"new-{at}")


def test_what_a_full_disk_refuses_is_kept_and_tried_again(catalog, stored, filled):
    original, full = catalog.commit_batch, threading.Event()
    full.set()

    def refusing(cohort, commits):
        if full.is_set():
            raise StorageError("the disk is full")
        return original(cohort, commits)

    catalog.commit_batch = refusing
    with Residency(catalog, stored, slots=4) as residency:
        written = [residency.write_back(Commit(f"late-{at}", adapter(at))) for at in range(3)]
        for _ in range(2):
            with pytest.raises(StorageError, match="full"):
                residency.flush()
        assert not any(one.done() for one in written)
        full.clear()
        residency.flush()
        assert [one.result().revision for one in written] == [1, 1, 1]
    reader = Catalog.open(filled)
    for at in range(3):
        assert (reader.load(f"late-{at}")[0]["lm_head"]["a"] == at).all()
        reader.delete(f"late-{at}")


def test_a_lease_inside_bound_is_refused_by_name(residency):
    """It would consume the arrays that are bound. Another thread's waits for the end of the block."""
    with residency.lease(_requests(0)) as lease:
        refused = pytest.raises(PopulationError, match="a lease inside `bound`")
        with residency.bound(lease), refused, residency.lease(_requests(1)):
            pass
        assert _values(residency, lease) == [0]
        got = []

        def other():
            with residency.lease(_requests(1)) as mine:
                got.append(_values(residency, mine))

        with residency.bound(lease):
            thread = threading.Thread(target=other)
            thread.start()
            time.sleep(0.05)
            assert not got
        thread.join()
    assert got == [[1]]


def test_rows_that_do_not_come_in_time_are_an_error_and_come_for_the_others(catalog, stored):
    gate, original = threading.Event(), catalog.read_rows
    catalog.read_rows = lambda manifests: gate.wait() and original(manifests)
    with Residency(catalog, stored, slots=2) as residency:
        late = pytest.raises(ResidencyTimeoutError, match=r"not loaded in 0\.05 s")
        with late, residency.lease(_requests(0), timeout_s=0.05):
            pass
        # Its slot is still its own: of two slots one is free, and a second user's rows are awaited as well.
        full = pytest.raises(ResidencyTimeoutError, match=r"did not get their slots in 0\.05 s")
        with full, residency.lease(_requests(1, 2), timeout_s=0.05):
            pass
        got = []

        def patient():
            with residency.lease(_requests(0), timeout_s=60) as lease:
                got.append(_values(residency, lease))

        thread = threading.Thread(target=patient)
        thread.start()
        gate.set()
        thread.join()
        assert got == [[0]]
        assert residency.counters().catalog.loads == 1
        with residency.lease(_requests(1, 2), timeout_s=60) as lease:
            assert _values(residency, lease) == [1, 2]


def test_prefetch_takes_no_more_than_there_is_room_for(catalog, stored):
    gate, original = threading.Event(), catalog.read_rows
    catalog.read_rows = lambda manifests: gate.wait() and original(manifests)
    with Residency(catalog, stored, slots=4) as residency:
        residency._loader._max_waiting = 10
        assert residency.prefetch(_requests(*range(8))) == 8
        taken = 8 + residency.prefetch(_requests(*range(8, 40)))
        # One batch may have been taken up meanwhile; what waits is bounded.
        assert taken <= 8 + 10
        assert len(residency._loader._waiting) <= 10
        # Who needs a row now is not turned away.
        gate.set()
        with residency.lease(_requests(50, 51)) as lease:
            assert _values(residency, lease) == [50, 51]
