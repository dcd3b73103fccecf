"""The line of those who wait for device slots: served in the order in which they came."""

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from popax.errors import ResidencyTimeoutError


class Line:
    """Its lock is the caller's condition, which is told whenever something changes."""

    def __init__(self, changed: threading.Condition):
        self.waits, self.wait_s = 0, 0.0
        self._changed = changed
        self._tickets: collections.deque[object] = collections.deque()

    def __len__(self) -> int:
        return len(self._tickets)

    @contextlib.contextmanager
    def turn(self, fits: Callable[[], bool], timeout_s: float | None, what: Callable[[], str]) -> Iterator[None]:
        """The block runs once it is this caller's turn and `fits`, with the condition held; what(): of the error.

        Raises ResidencyTimeoutError.
        """
        ticket, began = object(), time.monotonic()
        with self._changed:
            self._tickets.append(ticket)
            try:
                ready = lambda: self._tickets[0] is ticket and fits()  # noqa: E731
                if not ready():
                    self.waits += 1
                    if not self._changed.wait_for(ready, timeout_s):
                        raise ResidencyTimeoutError(
                            f"{what()}, {len(self) - 1} requests wait beside this one; make more slots, or admit fewer "
                            "requests"
                        )
                    self.wait_s += time.monotonic() - began
                yield
            finally:
                self._tickets.remove(ticket)
                self._changed.notify_all()
