"""Signs of life: a process that waits for a lost one, in a collective that never returns, ends with a named error.

Process 0 watches all others; the others watch process 0, and are told by it who is lost. The signs are counters in the
key-value store of jax's coordination service, which lives in process 0.
"""

import os
import sys
import threading
import time
from typing import Any

from jax._src import distributed  # the service's client has no public name

from popax.distributed.group import ProcessGroup
from popax.distributed.messages import lost_message
from popax.errors import ProcessLostError

SIGNS, LOST = "popax/alive/", "popax/lost"
SIGNS_PER_TIMEOUT = 20


class Liveness:
    """While open, threads give and watch signs of life. A loss ends the process by ProcessLostError.exit_code."""

    def __init__(self, group: ProcessGroup, lost_after: float):
        self._group, self._lost_after = group, lost_after
        self._interval = min(1.0, lost_after / SIGNS_PER_TIMEOUT)
        self._closed = threading.Event()
        self._answered = time.monotonic()
        self._seen: dict[str, tuple[str, float]] = {}
        self._parent = os.getppid()

    def __enter__(self) -> "Liveness":
        if self._group.count > 1:
            self._client: Any = distributed.global_state.client
            for work in (self._exchange, self._watch):
                threading.Thread(target=work, name="popax-liveness", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()

    def _exchange(self) -> None:
        while not self._closed.wait(self._interval):
            try:
                self._client.key_value_increment(f"{SIGNS}{self._group.index}", 1)
                lost = self._lost_peers() if self._group.leads else self._told()
            except Exception:  # the service is away; how long it may be is `_watch`'s to say
                continue
            if self._closed.is_set():
                return
            self._answered = time.monotonic()
            if lost:
                self._end(lost)

    def _watch(self) -> None:
        """Apart from the exchange, whose calls may wait for a stopped process 0 longer than `lost_after`."""
        while not self._closed.wait(self._interval):
            if os.getppid() != self._parent:
                self._end("the parent", "it ended without its child")
            if time.monotonic() - self._answered > self._lost_after:
                self._end("process 0")

    def _lost_peers(self) -> str | None:
        now = time.monotonic()
        for key, value in self._client.key_value_dir_get(SIGNS):
            if self._seen.get(key, ("", 0.0))[0] != value:
                self._seen[key] = (value, now)
        late = [key.rpartition("/")[2] for key, (_, since) in self._seen.items() if now - since > self._lost_after]
        if not late:
            return None
        self._client.key_value_set(LOST, f"process {', '.join(sorted(late))}", allow_overwrite=True)
        time.sleep(2 * self._interval)  # the others read it before the service goes with this process
        return f"process {', '.join(sorted(late))}"

    def _told(self) -> str | None:
        try:
            return self._client.key_value_try_get(LOST)
        except Exception as error:
            if "NOT_FOUND" in str(error):
                return None
            raise

    def _end(self, who: str, why: str | None = None) -> None:
        message = lost_message(who, why or f"no sign of life for {self._lost_after:g} s")
        print(f"error: {ProcessLostError.__name__}: {message}", file=sys.stderr, flush=True)
        # The main thread is in a collective that does not return, and exit handlers would wait for the lost process.
        os._exit(ProcessLostError.exit_code)
