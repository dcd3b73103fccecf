"""The one training loop: a compiled step on batches that are built ahead, with validation as it goes."""

import collections
import concurrent.futures
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

StateT = TypeVar("StateT")
MetricsT = TypeVar("MetricsT")
KeyT = TypeVar("KeyT", bound=Hashable)
BatchT = TypeVar("BatchT")


class BatchesAhead(Generic[KeyT, BatchT]):
    """Batches by their keys, built in a thread before they are asked for.

    make: a pure function of the key. kept: how many wanted batches are held at most; the oldest is let go. What was
    wanted and is never taken has no effect, its errors included.
    """

    def __init__(self, make: Callable[[KeyT], BatchT], *, kept: int = 2):
        self._make, self._kept = make, kept
        self._wanted: collections.OrderedDict[KeyT, concurrent.futures.Future[BatchT]] = collections.OrderedDict()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="popax-batch")

    def want(self, key: KeyT) -> None:
        """Begin to build it, unless that has begun."""
        if key not in self._wanted:
            self._wanted[key] = self._thread.submit(self._make, key)
        while len(self._wanted) > self._kept:
            self._wanted.popitem(last=False)[1].cancel()

    def take(self, key: KeyT) -> BatchT:
        """The batch; waits for it. Raises what `make` raises."""
        self.want(key)
        return self._wanted.pop(key).result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "BatchesAhead[KeyT, BatchT]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def fit(
    state: StateT,
    *,
    steps: int,
    step: Callable[[StateT, BatchT], tuple[StateT, MetricsT]],
    batches: BatchesAhead[Any, BatchT],
    key: Callable[[int], Hashable] = lambda index: index,
    begins: int = 0,
    continues: bool = False,
    observe: Callable[[StateT], StateT] | None = None,
    every: int = 1,
    over: Callable[[StateT], bool] = lambda state: False,
    on_step: Callable[[int, StateT, MetricsT], object] = lambda done, state, metrics: None,
    stop: Callable[[], bool] = lambda: False,
) -> StateT:
    """The state after the steps begins .. steps-1: `state, metrics = step(state, batches.take(key(index)))`.

    The next step's batch is built while the device runs this one; continues: that of the step after the last one too.
    observe: a validation, before the first step, after each `every`-th and after the last one; over(state), asked then,
    ends the loop. on_step(done, state, metrics): after each step, before the state is donated to the next one. stop:
    asked before each step.
    """
    if observe is not None and begins == 0:
        state = observe(state)
    for index in range(begins, steps):
        if stop():
            break
        ready = batches.take(key(index))
        if continues or index + 1 < steps:
            batches.want(key(index + 1))
        state, metrics = step(state, ready)
        on_step(index + 1, state, metrics)
        if observe is not None and ((index + 1) % every == 0 or index + 1 == steps):
            state = observe(state)
            if over(state):
                break
    return state
