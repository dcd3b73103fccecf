"""One cohort's residency: requests in, slots out; rows move between catalog, host and device behind it."""

import concurrent.futures
import contextlib
import copy
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popax.adapters.apply import bind_slots
from popax.adapters.cohort import Cohort
from popax.errors import PopulationError, ResidencyTimeoutError
from popax.residency.checks import check_cohort, check_slots
from popax.residency.counters import Counters
from popax.residency.line import Line
from popax.residency.loader import Row, RowLoader
from popax.residency.lru import HostTier
from popax.residency.request import Key, Lease, Request
from popax.residency.slab import Slab
from popax.residency.table import SlotTable
from popax.residency.write_back import WriteBack, Written
from popax.store.catalog import Catalog
from popax.store.cohort import StoredCohort
from popax.store.commit import Commit
from popax.store.manifest import Manifest
from popax.types import Adapt, AdapterState

HOST_BYTES = 256 << 20
FILLERS = 16
Arrival = concurrent.futures.Future[None]


class Residency:
    """Device slots, a host tier, and the catalog below them, for the users of one cohort.

    A name ("latest", "promoted", a tag) is looked up in the catalog for every lease, so nobody is answered with what a
    user had before; bytes are kept by revision and digest. Safe between threads. `close` ends its threads.
    """

    def __init__(
        self,
        catalog: Catalog,
        cohort: StoredCohort,
        *,
        slots: int,
        host_bytes: int = HOST_BYTES,
        sharding: jax.sharding.Sharding | None = None,
    ):
        """slots: on the device; an update of them compiles nothing, from now on. sharding: of every slot array."""
        if slots < 1:
            raise PopulationError(f"{slots} device slots: at least 1")
        self._catalog, self.stored = catalog, cohort
        self.cohort = Cohort(cohort.config, tuple(cohort.specs.values()))
        self.shared = jax.tree.map(jnp.asarray, catalog.shared(cohort))
        self._slab = Slab(self.cohort, cohort.layout, slots, sharding)
        self._slab_lock, self._binding = threading.Lock(), None
        self._fillers = concurrent.futures.ThreadPoolExecutor(FILLERS, thread_name_prefix="popax-fill")
        self._changed = threading.Condition()
        self._table, self._host = SlotTable(slots), HostTier(host_bytes)
        self._arriving: dict[Key, Arrival] = {}
        self._line = Line(self._changed)
        self._loader = RowLoader(catalog.read_rows, self._keep)
        self._writer = WriteBack(catalog, cohort, self._keep)

    def prefetch(self, requests: Sequence[Request]) -> int:
        """Begin to bring those without a slot into the host tier; returns at once, with the number of requests that it
        took: the first so many, fewer where a great many are waiting already. `lease` tells what cannot load."""
        taken = requests[: self._loader.room]
        manifests = self._resolve(taken).values()
        with self._changed:
            absent = [manifest for manifest in manifests if Key.of(manifest) not in self._table]
        self._rows(absent)
        return len(taken)

    @contextlib.contextmanager
    def lease(self, requests: Sequence[Request], *, timeout_s: float | None = None) -> Iterator[Lease]:
        """The slots of these requests, held while the block runs. Leases are served in the order in which they came;
        all slots of one are taken together, so that two cannot wait for each other.

        Raises PopulationError where they need more slots than there are, or belong to another cohort, or the caller is
        inside `bound`; ResidencyTimeoutError where the slots are not free, or the rows not loaded, in time (they are
        loaded on, for others who wait); and what `Catalog.load` raises, for a user of this request only.
        """
        if self._binding == threading.get_ident():
            raise PopulationError(
                "a lease inside `bound` would replace the arrays that are bound: leave that block first, or ask for "
                "all users in one lease"
            )
        began = time.monotonic()
        manifests = self._resolve(requests)
        keys = {request: Key.of(manifest) for request, manifest in manifests.items()}
        pinned = list(dict.fromkeys(keys.values()))
        check_slots(len(pinned), self._table.slots)
        missing, arriving = self._admit(pinned, timeout_s)
        manifest_of = {Key.of(manifest): manifest for manifest in manifests.values()}
        filling = self._begin(missing, [manifest_of[key] for key in missing], timeout_s)
        try:
            for future in [*([filling] if filling else []), *arriving]:
                self._await(future, timeout_s, began)
            yield Lease(
                tuple(self._table.slot(keys[request]) if request in keys else -1 for request in requests),
                tuple(manifests.get(request) for request in requests),
            )
        finally:
            if filling is None or filling.done():
                self._release(pinned)
            else:  # timed out: its slots are its own until the rows are there
                filling.add_done_callback(lambda _: self._release(pinned))

    @contextlib.contextmanager
    def bound(self, lease: Lease) -> Iterator[Adapt]:
        """The lease's adapters, bound to its rows. No slot is replaced while the block runs, whoever waits for one: the
        arrays are those that an update would consume. So bind for a step or a batch, not for a conversation."""
        with self._slab_lock:
            self._binding = threading.get_ident()
            try:
                yield bind_slots(self.cohort, self._slab.arrays, self.shared, jnp.asarray(lease.slots, jnp.int32))
            finally:
                self._binding = None

    @property
    def adapters(self) -> AdapterState:
        """What the slots hold now, [L, S, ...]: gone with the next update, so read it inside `bound`, or in the thread
        that alone makes updates."""
        return self._slab.arrays

    def fetch(self, manifests: Sequence[Manifest]) -> list[np.ndarray | Row]:
        """Each row from the host tier, or the promise of it; what cannot be read is told where its result is taken."""
        return self._rows(manifests)

    def hold(self, rows: Mapping[Key, np.ndarray]) -> list[Key] | None:
        """Slots for these revisions, whose rows are at hand, until `let_go`; None where they are not free now. It waits
        for nothing: who shares a thread with others' answers asks so. Raises PopulationError where they are more than
        there are slots."""
        keys = list(rows)
        check_slots(len(keys), self._table.slots)
        with self._changed:
            if len(self._line) or any(key in self._arriving for key in keys) or not self._table.fits(set(keys)):
                return None
            missing = self._pinned(keys)
        if missing:
            self._fill(missing, lambda: [rows[key] for key in missing])
        return keys

    def let_go(self, keys: list[Key]) -> None:
        """The inverse of one `hold`: they stay where they are until somebody needs the slots."""
        self._release(keys)

    def occupants(self) -> list[dict[str, Any] | None]:
        """Who is in each slot, and whether somebody holds it; None for a free one."""
        with self._changed:
            return self._table.occupants()

    def slot(self, key: Key) -> int:
        """The slot of a revision that is held."""
        return self._table.slot(key)

    def write_back(self, commit: Commit) -> Written:
        """Commit a user's new revision behind the caller; once durable its row is in the host tier.

        Waits while too much is unwritten. What the catalog refuses is told by the result, and by `flush`.
        """
        return self._writer.put(commit)

    def flush(self) -> None:
        """Wait until all that was handed over is durable. Raises what the catalog refused."""
        self._writer.flush()

    def counters(self) -> Counters:
        """What happened so far."""
        with self._changed:
            return Counters(
                copy.copy(self._table.counters),
                copy.copy(self._host.counters),
                dataclasses.replace(self._loader.counters, written=self._writer.written),
                self._line.waits,
                self._line.wait_s,
                self._slab.updates,
            )

    def close(self) -> None:
        """Write what is unwritten and end the threads. Raises what the catalog refused."""
        self._fillers.shutdown()
        self._loader.close()
        self._writer.close()

    def __enter__(self) -> "Residency":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _resolve(self, requests: Sequence[Request]) -> dict[Request, Manifest]:
        named = list(dict.fromkeys(request for request in requests if request.user is not None))
        asked = [(str(request.user), request.revision) for request in named]
        manifests = self._catalog.resolve(asked, base_digest=self.stored.base_digest)
        check_cohort(manifests, self.stored)
        return dict(zip(named, manifests, strict=True))

    def _admit(self, keys: list[Key], timeout_s: float | None) -> tuple[dict[Key, int], list[Arrival]]:
        """Wait for this lease's turn and for its slots, and pin them; returns those that have to be written, and the
        arrivals of those that other leases are writing. Whoever is pinned here is in its slot once these have come."""

        def lacking() -> str:
            free = f"{self._table.available} of {self._table.slots} slots are free"
            return f"{len(keys)} adapters did not get their slots in {timeout_s} s: {free}"

        with self._line.turn(lambda: self._table.fits(set(keys)), timeout_s, lacking):
            # Taken in this instant: an arrival that fails later is gone from the table, with its slot.
            arriving = [self._arriving[key] for key in keys if key in self._arriving]
            return self._pinned(keys), arriving

    def _pinned(self, keys: list[Key]) -> dict[Key, int]:
        missing = self._table.pin(keys)
        for key in missing:
            self._arriving[key] = concurrent.futures.Future()
        return missing

    def _begin(self, missing: dict[Key, int], manifests: Sequence[Manifest], timeout_s: float | None) -> Arrival | None:
        """Fill the slots; None where that is done. With a time limit on a thread of its own, which goes on after it."""
        if not missing:
            return None
        if timeout_s is not None:
            return self._fillers.submit(self._fill, missing, lambda: self._rows(manifests))
        filled: Arrival = concurrent.futures.Future()
        try:
            self._fill(missing, lambda: self._rows(manifests))
        except BaseException as error:
            filled.set_exception(error)
        else:
            filled.set_result(None)
        return filled

    def _await(self, arrival: Arrival, timeout_s: float | None, began: float) -> None:
        left = None if timeout_s is None else max(0.0, began + timeout_s - time.monotonic())
        try:
            arrival.result(left)
        except concurrent.futures.TimeoutError as error:
            if arrival.done():
                raise  # an error of the storage's own
            raise ResidencyTimeoutError(
                f"the rows of a lease were not loaded in {timeout_s} s; the storage {self._catalog.place!r} is slow, "
                "or away: ask again, or allow more time"
            ) from error

    def _release(self, pinned: list[Key]) -> None:
        with self._changed:
            self._table.unpin(pinned)
            self._changed.notify_all()

    def _fill(self, missing: dict[Key, int], fetch: Callable[[], Sequence[np.ndarray | Row]]) -> None:
        """Write the rows of those who were not resident. Who cannot be loaded gets no slot, and the first such error is
        raised after the others have theirs."""
        failed: dict[Key, BaseException] = {}
        try:
            asked = dict(zip(missing, fetch(), strict=True))
            rows: dict[Key, np.ndarray] = {}
            for key, row in asked.items():
                try:
                    rows[key] = row if isinstance(row, np.ndarray) else row.result()
                except Exception as error:
                    failed[key] = error
            with self._slab_lock:
                self._slab.write([missing[key] for key in rows], list(rows.values()))
            with self._changed:
                self._table.counters.bytes_in += sum(row.nbytes for row in rows.values())
                for key in rows:
                    self._arriving.pop(key).set_result(None)
        except BaseException as error:
            failed |= {key: error for key in missing if key in self._arriving}
            raise
        finally:
            with self._changed:
                for key, error in failed.items():
                    self._table.forget(key)
                    self._arriving.pop(key).set_exception(error)
        if failed:
            raise next(iter(failed.values()))

    def _rows(self, manifests: Sequence[Manifest]) -> list[np.ndarray | Row]:
        """Each row, or the promise of it."""
        with self._changed:
            found: list[np.ndarray | Row | None] = [self._host.get(Key.of(manifest)) for manifest in manifests]
            # Under the lock that arriving rows need: what is not in the tier now is not yet told, and shared.
            asked = iter(self._loader.ask([one for one, row in zip(manifests, found, strict=True) if row is None]))
        return [next(asked) if row is None else row for row in found]

    def _keep(self, rows: Mapping[Key, np.ndarray]) -> None:
        with self._changed:
            for key, row in rows.items():
                self._host.put(key, row)
