"""Rows on their way: asked for before their answers are admitted, and bounded, however many answers wait."""

import concurrent.futures
import threading
from collections.abc import Callable

from popax.serving.request import Answer
from popax.serving.rooms import Rooms


class Incoming:
    """Answers keep their rows from when they were asked for until they are in slots. Any thread may call."""

    def __init__(self, rooms: Rooms | None, arrived: Callable[[], None]):
        """arrived(): a row has come, or failed to."""
        self._rooms, self._arrived = rooms, arrived
        self._lock, self._bytes = threading.Lock(), 0

    def on_arrival(self, answer: Answer) -> None:
        """Ask for the rows of an answer that has just come, unless as many bytes as the host tier has wait already."""
        if answer.request.terms and self._rooms is not None:
            answer.loading = None
            self._ask(answer, self._rooms, self._rooms.host_bytes)

    def in_turn(self, answer: Answer) -> None:
        """Ask for the rows of an answer that could be admitted. Twice as many bytes may wait then: one tenant's crowd
        does not keep another's rows from being read."""
        if answer.loading is None and self._rooms is not None:
            self._ask(answer, self._rooms, 2 * self._rooms.host_bytes)

    def drop(self, answer: Answer) -> None:
        """Its rows are in slots now, or it is over: who needs them again asks again."""
        if not answer.loading or self._rooms is None:
            return
        answer.loading = None
        with self._lock:
            self._bytes -= self._rooms.row_bytes(answer.request.terms)

    def _ask(self, answer: Answer, rooms: Rooms, most: int) -> None:
        size = rooms.row_bytes(answer.request.terms)
        with self._lock:
            if self._bytes and self._bytes + size > most:
                return
            self._bytes += size
        answer.loading = rooms.fetch(answer.request.terms)
        for row in answer.loading:
            if isinstance(row, concurrent.futures.Future):
                row.add_done_callback(lambda _: self._arrived())
