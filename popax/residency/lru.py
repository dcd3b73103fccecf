"""The host tier: packed rows under a budget of bytes, the least recently used one goes first."""

import collections
import dataclasses

import numpy as np

from popax.errors import PopulationError
from popax.residency.counters import TierCounters
from popax.residency.request import Key


@dataclasses.dataclass
class _Entry:
    row: np.ndarray
    pins: int = 0


class HostTier:
    """Rows by key. Not safe between threads: whoever owns it holds a lock.

    What is pinned stays, and what is unwritten is pinned: the budget is for the rest, and for a row that just came.
    """

    def __init__(self, max_bytes: int):
        if max_bytes < 0:
            raise PopulationError(f"a host tier of {max_bytes} bytes: 0 (keep nothing) or more")
        self.max_bytes, self.bytes = max_bytes, 0
        self.counters = TierCounters()
        self._entries: collections.OrderedDict[Key, _Entry] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def get(self, key: Key) -> np.ndarray | None:
        """The row, counted as a hit and now the most recently used; None is a miss."""
        entry = self._entries.get(key)
        if entry is None:
            self.counters.misses += 1
            return None
        self.counters.hits += 1
        self._entries.move_to_end(key)
        return entry.row

    def put(self, key: Key, row: np.ndarray, *, pinned: bool = False) -> None:
        """Keep a row, and let go of others until the budget holds; a row that alone is over it is not kept."""
        if key in self._entries:
            self._entries.move_to_end(key)
        else:
            self._entries[key] = _Entry(row)
            self.bytes += row.nbytes
            self.counters.bytes_in += row.nbytes
        self._entries[key].pins += pinned
        self._shrink()

    def pin(self, key: Key) -> None:
        """Keep a row that is there until `unpin`."""
        self._entries[key].pins += 1

    def unpin(self, key: Key) -> None:
        """The inverse of one `pin`."""
        self._entries[key].pins -= 1
        self._shrink()

    def _shrink(self) -> None:
        while self.bytes > self.max_bytes:
            victim = next((key for key, entry in self._entries.items() if not entry.pins), None)
            if victim is None:
                return
            self.bytes -= self._entries.pop(victim).row.nbytes
            self.counters.evictions += 1
