"""Ctrl-C and preemption: the first signal asks for a clean stop, the second one interrupts."""

import signal
from types import FrameType


class StopOnSignal:
    """While open, SIGINT and SIGTERM set `requested`; a second SIGINT raises KeyboardInterrupt. Main thread only.

    preempted: SIGTERM, the notice before a machine is taken away, was among them.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.requested = False
        self.preempted = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopOnSignal":
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            # None: set by code outside Python, which cannot be set again from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]

    def __call__(self) -> bool:
        return self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        self.preempted |= number == signal.SIGTERM
