"""What a catalog holds, counted."""

import collections
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from popax.store.catalog import Catalog
from popax.store.database import is_local


@dataclasses.dataclass(kw_only=True)
class CohortCount:
    """The users whose latest revision is of one cohort."""

    cohort: str
    base_digest: str
    method: str
    rank: int
    row_bytes: int
    users: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """Counts over all users. file_bytes: on disk, what `gc` would give back included; None at a URL."""

    users: int
    revisions: int
    promoted: int
    tags: int
    file_bytes: int | None
    cohorts: tuple[CohortCount, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "cohorts": [dataclasses.asdict(one) for one in self.cohorts]}


def statistics(catalog: Catalog, progress: Callable[[int], None] = lambda users: None) -> Statistics:
    """Read every user's record and count. progress(users read so far) is called now and then."""
    cohorts: dict[str, CohortCount] = {}
    total: collections.Counter[str] = collections.Counter()
    for record, latest in catalog.users():
        total.update(
            users=1,
            revisions=record.latest - record.oldest + 1,
            promoted=record.promoted is not None,
            tags=len(record.tags),
        )
        if latest.cohort not in cohorts:
            cohorts[latest.cohort] = CohortCount(
                cohort=latest.cohort,
                base_digest=latest.base_digest,
                method=latest.config["method"],
                rank=latest.config["rank"],
                row_bytes=catalog.cohort_of(latest).layout.row_bytes,
            )
        cohorts[latest.cohort].users += 1
        if total["users"] % 10_000 == 0:
            progress(total["users"])
    return Statistics(
        **{name: total[name] for name in ("users", "revisions", "promoted", "tags")},
        file_bytes=directory_bytes(Path(catalog.place).expanduser()) if is_local(catalog.place) else None,
        cohorts=tuple(sorted(cohorts.values(), key=lambda one: -one.users)),
    )


def directory_bytes(directory: Path) -> int:
    """The sum of the sizes of the files below."""
    return sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(directory) for name in names)
