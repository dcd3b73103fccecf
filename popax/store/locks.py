"""Locks between the processes and threads that use a catalog in a local directory: writers, and the collector."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from popax.errors import ConflictError, StorageError

FOLDER = "locks"


class CatalogLocks:
    """Writers share, the collector is alone for an instant, readers take none.

    Each hold is an open file of its own, so threads of one process exclude each other as processes do, and a process
    that is killed holds nothing. In a place that is no local directory nothing is locked: there the collector waits
    out a grace period instead (see `gc`).
    """

    def __init__(self, directory: Path | None):
        self._folder = directory and directory / FOLDER

    @property
    def real(self) -> bool:
        """Whether there are locks: a local directory."""
        return self._folder is not None

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Held by a writer from its first read until its commit is there."""
        with contextlib.ExitStack() as stack:
            with self._held("turn", fcntl.LOCK_SH):  # waits while the collector is next
                stack.enter_context(self._held("writers", fcntl.LOCK_SH))
            yield

    @contextlib.contextmanager
    def committing(self) -> Iterator[None]:
        """Held, inside `writing`, while a commit is made: one at a time. See `Database.committing`."""
        with self._held("commit", fcntl.LOCK_EX):
            yield

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """While this is held no writer is between its first read and its commit. Those that come wait, those that are
        there finish: a stream of them cannot keep the collector waiting."""
        with self._held("turn", fcntl.LOCK_EX), self._held("writers", fcntl.LOCK_EX):
            yield

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Held by the one collector. Raises ConflictError where there is another."""
        try:
            with self._held("collector", fcntl.LOCK_EX | fcntl.LOCK_NB):
                yield
        except BlockingIOError as error:
            raise ConflictError(f"{self._folder} is held: another gc is running; wait for it to end") from error

    @contextlib.contextmanager
    def _held(self, name: str, mode: int) -> Iterator[None]:
        if self._folder is None:
            yield
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            held = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StorageError(
                f"{str(self._folder)!r} refused: {error}; nothing was committed. Free space or fix the permissions, "
                "then repeat"
            ) from error
        try:
            fcntl.flock(held, mode)
            yield
        finally:
            os.close(held)
