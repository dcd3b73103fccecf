"""What happened at each tier, counted."""

import dataclasses
from typing import Any


@dataclasses.dataclass
class TierCounters:
    """hits, misses: of requests that reached the tier. evictions: of entries. bytes_in: brought into it."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_in: int = 0

    @property
    def hit_rate(self) -> float:
        """NaN before the first request."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else float("nan")


@dataclasses.dataclass
class CatalogCounters:
    """loads: revisions read. batches: reads that they took. coalesced: waiters who shared another one's load.
    written: revisions committed. failed: loads that ended in an error."""

    loads: int = 0
    batches: int = 0
    coalesced: int = 0
    bytes_read: int = 0
    written: int = 0
    failed: int = 0


@dataclasses.dataclass(frozen=True)
class Counters:
    """A moment's copy. waits, wait_s: leases that had to wait for free slots, and for how long in sum."""

    device: TierCounters
    host: TierCounters
    catalog: CatalogCounters
    waits: int
    wait_s: float
    device_updates: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)
