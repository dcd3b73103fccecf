"""Progress on stderr: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Progress:
    """Counts `update`s towards `total`. On a terminal it is a bar; elsewhere one line every `interval` seconds.

    A log thus holds a few lines of a long run, and none of a run shorter than the interval but its last.
    """

    def __init__(
        self,
        name: str,
        *,
        total: int | None = None,
        start: int = 0,
        unit: str = "step",
        interval: float = 15.0,
        stream: TextIO | None = None,
    ):
        self.stream = sys.stderr if stream is None else stream
        self.name, self.total, self.unit, self.interval = name, total, unit, interval
        self.done = self._start = start
        self._note = ""
        self._began = self._last_line = time.monotonic()
        self._bar = None
        if self.stream.isatty():
            self._bar = tqdm(
                desc=name, total=total, initial=start, unit=unit, file=self.stream, dynamic_ncols=True, leave=True
            )

    def update(self, count: int = 1, note: str = "") -> None:
        """`count` more are done; `note` is shown behind the bar, for instance the loss."""
        self.done += count
        self._note = note or self._note
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= self.interval:
            self._line()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.done > self._start:
            self._line()

    def _line(self) -> None:
        self._last_line = time.monotonic()
        elapsed = self._last_line - self._began
        rate = (self.done - self._start) / elapsed if elapsed > 0 else 0.0
        of = f"/{self.total}" if self.total is not None else ""
        note = f", {self._note}" if self._note else ""
        line = f"{self.name}: {self.done}{of} {self.unit}s, {elapsed:.0f} s, {rate:.3g} {self.unit}s/s{note}"
        print(line, file=self.stream, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def progress(items: Iterable[T], name: str, *, total: int | None = None, unit: str = "step") -> Iterator[T]:
    """The same items, counted; total defaults to len(items) where it has one."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # pyright: ignore[reportArgumentType]
    with Progress(name, total=total, unit=unit) as counter:
        for item in items:
            yield item
            counter.update()
