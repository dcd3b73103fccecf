"""Reading rows from the catalog: one load for all who wait for it, and one batch for all that waits."""

import concurrent.futures
import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from popax.residency.counters import CatalogCounters
from popax.residency.request import Key
from popax.store.manifest import Manifest

Row = concurrent.futures.Future[np.ndarray]


class RowLoader:
    """A thread that reads what has been asked for since it last looked, in one batch.

    While a batch is read the next one gathers: however many ask at once, the reads are as many as the batches, and no
    one waits in a line of single reads.
    """

    def __init__(
        self,
        read: Callable[[Sequence[Manifest]], list[np.ndarray]],
        arrived: Callable[[Mapping[Key, np.ndarray]], None],
        *,
        max_batch: int = 4096,
        max_waiting: int = 65_536,
    ):
        """read: `Catalog.read_rows`. arrived(rows): before those who wait are told. max_waiting: what `room` is of."""
        self.counters = CatalogCounters()
        self._read, self._arrived, self._max_batch, self._max_waiting = read, arrived, max_batch, max_waiting
        self._changed = threading.Condition()
        self._waiting: dict[Key, Manifest] = {}
        self._promised: dict[Key, Row] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="popax-resident", daemon=True)
        self._thread.start()

    def ask(self, manifests: Sequence[Manifest]) -> list[Row]:
        """Their rows, in time; together, so that one batch can have them all.

        An error is told to all who wait for that row, and to no one else; the next who asks makes a new attempt.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("the loader is closed")
            rows = [self._promise(Key.of(manifest), manifest) for manifest in manifests]
            self._changed.notify_all()
            return rows

    @property
    def room(self) -> int:
        """How many more may be asked for ahead of time: who needs a row now asks whether there is room or not."""
        return max(0, self._max_waiting - len(self._waiting))

    def _promise(self, key: Key, manifest: Manifest) -> Row:
        if (promised := self._promised.get(key)) is not None:
            self.counters.coalesced += 1
            return promised
        promised = self._promised[key] = concurrent.futures.Future()
        self._waiting[key] = manifest
        return promised

    def close(self) -> None:
        """Finish what was asked for, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                keys = list(self._waiting)[: self._max_batch]
                batch = {key: self._waiting.pop(key) for key in keys}
                self.counters.batches += 1
            self._settle(batch)

    def _settle(self, batch: dict[Key, Manifest]) -> None:
        rows = self._read_apart(list(batch.values()))
        read = {key: row for key, row in zip(batch, rows, strict=True) if not isinstance(row, BaseException)}
        self._arrived(read)
        with self._changed:
            promised = [(self._promised.pop(key), row) for key, row in zip(batch, rows, strict=True)]
            self.counters.failed += len(batch) - len(read)
            self.counters.loads += len(read)
            self.counters.bytes_read += sum(row.nbytes for row in read.values())
        # The last first: who waits for all of them, in their order, is woken once.
        for row, value in reversed(promised):
            if isinstance(value, BaseException):
                row.set_exception(value)
            else:
                row.set_result(value)

    def _read_apart(self, manifests: list[Manifest]) -> list[np.ndarray | BaseException]:
        """The rows, or what kept each from being read: a batch that fails is halved until the broken ones stand alone,
        so that they are nobody else's error and cost the others a few reads."""
        try:
            return [*self._read(manifests)]
        except BaseException as error:
            if len(manifests) == 1:
                return [error]
        middle = len(manifests) // 2
        return [*self._read_apart(manifests[:middle]), *self._read_apart(manifests[middle:])]
