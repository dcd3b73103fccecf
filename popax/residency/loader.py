"""Reading rows from the catalog: one load for all who wait for it, and one batch for all that waits."""

import concurrent.futures
import threading
from collections.abc import Callable, Sequence

import numpy as np

from popax.errors import PopaxError
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
        arrived: Callable[[Key, np.ndarray], None],
        *,
        max_batch: int = 4096,
    ):
        """read: `Catalog.read_rows`. arrived(key, row): before those who wait are told."""
        self.counters = CatalogCounters()
        self._read, self._arrived, self._max_batch = read, arrived, max_batch
        self._changed = threading.Condition()
        self._waiting: dict[Key, Manifest] = {}
        self._promised: dict[Key, Row] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="popax-resident", daemon=True)
        self._thread.start()

    def ask(self, manifest: Manifest) -> Row:
        """The row, in time. An error is told to all who wait for this row, and to no one else; the next who asks makes
        a new attempt."""
        key = Key.of(manifest)
        with self._changed:
            if self._closed:
                raise RuntimeError("the loader is closed")
            if (promised := self._promised.get(key)) is not None:
                self.counters.coalesced += 1
                return promised
            promised = self._promised[key] = concurrent.futures.Future()
            self._waiting[key] = manifest
            self._changed.notify_all()
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
        try:
            rows: list[np.ndarray | BaseException] = [*self._read(list(batch.values()))]
        except BaseException as error:
            rows = [self._alone(manifest) for manifest in batch.values()] if len(batch) > 1 else [error]
        for key, row in zip(batch, rows, strict=True):
            if not isinstance(row, BaseException):
                self._arrived(key, row)
            with self._changed:
                promised = self._promised.pop(key)
                if isinstance(row, BaseException):
                    self.counters.failed += 1
                else:
                    self.counters.loads += 1
                    self.counters.bytes_read += row.nbytes
            if isinstance(row, BaseException):
                promised.set_exception(row)
            else:
                promised.set_result(row)

    def _alone(self, manifest: Manifest) -> np.ndarray | BaseException:
        """After a batch has failed: one broken revision must not be the others' error."""
        try:
            return self._read([manifest])[0]
        except (PopaxError, OSError, ValueError) as error:
            return error
