"""Which users of a catalog are meant: by id, base, cohort, promotion, tag and time."""

import dataclasses
import datetime
from typing import Literal

from popax.errors import CatalogError
from popax.store.manifest import Manifest, UserRecord

Status = Literal["promoted", "candidate"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserFilter:
    """What a user's record and latest revision must be; what is None is not asked for.

    prefix: of the id. base: the digest of the base, or its start. cohort: its id, or its start. method: of the
    adapter. status: "promoted": serving follows the latest revision; "candidate": it does not. tag: one of the user's.
    basis: the digest, or its start, of the basis that the row is written in. since, until: when the latest revision was
    committed, UTC, ISO 8601 (a date alone is its midnight): since <= time < until.
    Raises CatalogError on a status or a time that is none.
    """

    prefix: str = ""
    base: str | None = None
    cohort: str | None = None
    method: str | None = None
    status: Status | None = None
    tag: str | None = None
    basis: str | None = None
    since: str | None = None
    until: str | None = None

    def __post_init__(self):
        if self.status not in (None, "promoted", "candidate"):
            raise CatalogError(f"status {self.status!r} is neither 'promoted' nor 'candidate'")
        for name in ("since", "until"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, _utc(name, given))

    def matches(self, record: UserRecord, latest: Manifest) -> bool:
        """Whether the user is meant."""
        return (
            record.user.startswith(self.prefix)
            and latest.base_digest.startswith(self.base or "")
            and latest.cohort.startswith(self.cohort or "")
            and self.method in (None, latest.config["method"])
            and self.status in (None, "promoted" if record.promoted == record.latest else "candidate")
            and (self.tag is None or self.tag in record.tags)
            and (self.basis is None or (latest.codec or {}).get("basis", "").startswith(self.basis))
            and (self.since is None or latest.created >= self.since)
            and (self.until is None or latest.created < self.until)
        )


def _utc(name: str, given: str) -> str:
    """The time as manifests write it, so that text compares as time does."""
    try:
        time = datetime.datetime.fromisoformat(given)
    except ValueError as error:
        raise CatalogError(f"{name} {given!r} is no time; write it as 2026-11-26 or 2026-11-26T12:30:00Z") from error
    time = time.replace(tzinfo=time.tzinfo or datetime.UTC)
    return time.astimezone(datetime.UTC).isoformat(timespec="milliseconds")
