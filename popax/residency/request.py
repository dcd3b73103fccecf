"""Who is asked for, and what is found: names that resolve, and identities that do not change."""

import dataclasses
from typing import NamedTuple

from popax.store.manifest import Manifest
from popax.store.pointers import Which


class Request(NamedTuple):
    """Whose adapter a row wants. revision: a number, "latest" (also None), "promoted" or a tag. user None: the base."""

    user: str | None
    revision: Which = None


class Key(NamedTuple):
    """One immutable revision. What is resident is known by this, never by a user's name: a new revision, or another
    user under an old name, is another key (the digest tells those apart)."""

    user: str
    revision: int
    digest: str

    @classmethod
    def of(cls, manifest: Manifest) -> "Key":
        return cls(manifest.user, manifest.revision, manifest.digest)


@dataclasses.dataclass(frozen=True)
class Lease:
    """Slots that stay as they are until it ends: one for each request, -1 for the base; the manifest of each."""

    slots: tuple[int, ...]
    manifests: tuple[Manifest | None, ...]
