"""Where a revision lies just now: the catalog, the host's memory, a device slot. Eviction never deletes identity."""

from popax.residency.request import Lease, Request
from popax.residency.residency import Residency

__all__ = ["Lease", "Request", "Residency"]
