"""Who is in which device slot, and who may be made to leave it."""

import collections
from typing import Any

from popax.residency.counters import TierCounters
from popax.residency.request import Key


class SlotTable:
    """key -> slot, least recently used first. A slot that is leased has pins and is not given away.

    Not safe between threads: whoever owns it holds a lock.
    """

    def __init__(self, slots: int):
        self.slots = slots
        self.counters = TierCounters()
        self._free = list(range(slots))[::-1]
        self._slot: collections.OrderedDict[Key, int] = collections.OrderedDict()
        self._pins: collections.Counter[Key] = collections.Counter()

    def __contains__(self, key: Key) -> bool:
        return key in self._slot

    @property
    def available(self) -> int:
        """How many slots are free, or hold nobody who is needed."""
        return self.slots - sum(key in self._slot for key in self._pins)

    def fits(self, keys: set[Key]) -> bool:
        """Whether all of these can be resident at once now: those who are not held need a slot each."""
        return sum(not (key in self._slot and key in self._pins) for key in keys) <= self.available

    def pin(self, keys: list[Key]) -> dict[Key, int]:
        """Pin these; returns the slots of those who were not resident and have to be written. `fits` holds."""
        missing = {}
        # Those who are there first: none of them may be evicted for the others.
        for key in keys:
            if key in self._slot:
                self.counters.hits += 1
                self._slot.move_to_end(key)
                self._pins[key] += 1
        for key in keys:
            if key not in self._slot:
                self.counters.misses += 1
                missing[key] = self._slot[key] = self._take()
                self._pins[key] += 1
        return missing

    def unpin(self, keys: list[Key]) -> None:
        """The inverse of one `pin`."""
        for key in keys:
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]

    def forget(self, key: Key) -> None:
        """Nobody came into the slot after all: it is free, and whoever asks next begins anew."""
        self._free.append(self._slot.pop(key))

    def slot(self, key: Key) -> int:
        return self._slot[key]

    def occupants(self) -> list[dict[str, Any] | None]:
        """Of each slot: the user, the revision, and whether it is pinned."""
        found: list[dict[str, Any] | None] = [None] * self.slots
        for key, slot in self._slot.items():
            found[slot] = {"user": key.user, "revision": key.revision, "held": key in self._pins}
        return found

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        victim = next(key for key in self._slot if key not in self._pins)
        self.counters.evictions += 1
        return self._slot.pop(victim)
