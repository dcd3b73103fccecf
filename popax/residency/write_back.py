"""Committing new revisions behind whoever made them: durable before they can be forgotten."""

import collections
import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable, Mapping

import numpy as np

from popax.errors import PopaxError, StorageError
from popax.residency.request import Key
from popax.store.catalog import Catalog
from popax.store.cohort import StoredCohort
from popax.store.commit import Commit
from popax.store.manifest import Manifest

Written = concurrent.futures.Future[Manifest]
_Handed = tuple[Commit, np.ndarray, Written]
UNWRITTEN_BYTES = 256 << 20


class WriteBack:
    """A thread that commits what has been handed over since it last looked, in one transaction.

    A row is held here until its revision is durable. One refused commit does not hold back the others of its batch.
    """

    def __init__(
        self,
        catalog: Catalog,
        cohort: StoredCohort,
        kept: Callable[[Mapping[Key, np.ndarray]], None],
        *,
        max_bytes: int = UNWRITTEN_BYTES,
    ):
        """kept(rows): when their revisions are durable."""
        self.written = 0
        self._catalog, self._cohort, self._kept, self._max_bytes = catalog, cohort, kept, max_bytes
        self._changed = threading.Condition()
        self._queue: collections.deque[_Handed] = collections.deque()
        self._bytes = self._under_way = 0
        self._failure: BaseException | None = None
        self._closed = self._paused = False
        self._thread = threading.Thread(target=self._work, name="popax-write-back", daemon=True)
        self._thread.start()

    def put(self, commit: Commit) -> Written:
        """Hand over one revision; waits while `max_bytes` are unwritten. Raises PopulationError where the adapter does
        not fit the cohort."""
        row = self._cohort.layout.checked(commit.adapter)
        result: Written = concurrent.futures.Future()
        with self._changed:
            fits = lambda: not self._bytes or self._bytes + row.nbytes <= self._max_bytes  # noqa: E731
            self._changed.wait_for(lambda: fits() or self._paused)
            if self._closed:
                raise RuntimeError("write-back is closed")
            if not fits():
                raise StorageError(
                    f"{self._bytes:,} bytes are unwritten since the storage refused them; free space, then flush"
                )
            self._queue.append((dataclasses.replace(commit, adapter=row), row, result))
            self._bytes += row.nbytes
            self._changed.notify_all()
        return result

    def flush(self) -> None:
        """Wait until all is durable. Raises the first thing that the catalog refused since the last flush.

        What the storage refused (a full disk, say) is kept and tried again by the next flush; what cannot be committed
        at all, a conflict, is told and let go.
        """
        with self._changed:
            self._paused = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._paused or (not self._queue and not self._under_way))
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Flush, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._queue and not self._paused))
                if not self._queue or self._paused:
                    return  # closed; what a full disk still holds back was told by `flush`, or is by `close`
                batch = self._next_batch()
                self._under_way = len(batch)
            kept = self._commit(batch)
            with self._changed:
                self._queue.extendleft(reversed(kept))
                self._under_way = 0
                self._bytes -= sum(row.nbytes for _, row, _ in batch) - sum(row.nbytes for _, row, _ in kept)
                self._paused = self._paused or bool(kept)
                self._changed.notify_all()

    def _next_batch(self) -> list[_Handed]:
        """What is queued, up to a user's second revision, which builds on the first."""
        batch, users = [], set()
        while self._queue and self._queue[0][0].user not in users:
            batch.append(self._queue.popleft())
            users.add(batch[-1][0].user)
        return batch

    def _commit(self, batch: list[_Handed]) -> list[_Handed]:
        """Commit them; returns those that the storage refused, which are to be tried again."""
        try:
            manifests = self._catalog.commit_batch(self._cohort, [commit for commit, _, _ in batch])
        except StorageError as error:
            self._failed(error)
            return batch
        except Exception as error:
            if len(batch) > 1 and isinstance(error, PopaxError):
                return [kept for one in batch for kept in self._commit([one])]
            self._failed(error)
            for _, _, result in batch:
                result.set_exception(error)
            return []
        self._kept({Key.of(manifest): row for manifest, (_, row, _) in zip(manifests, batch, strict=True)})
        self.written += len(batch)
        for manifest, (_, _, result) in zip(manifests, batch, strict=True):
            result.set_result(manifest)
        return []

    def _failed(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
