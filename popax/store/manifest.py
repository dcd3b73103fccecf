"""The record of one revision: what the bytes are, for which base, and where they came from."""

import dataclasses
import datetime
from collections.abc import Mapping
from typing import Any

from popax.store.records import shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """One immutable revision of one user's adapter.

    revision: from 1. parent: the revision it was trained from, None for a first one. cohort: id of the stored
    cohort, whose config and base digest are repeated here. row: index in the cohort's rows of the shard `shard`.
    digest: sha256 of the packed row. created: UTC, ISO 8601. run: the training run that committed it; the same run
    committing the same bytes again is not a new revision.
    """

    user: str
    revision: int
    cohort: str
    row: int
    digest: str
    base_digest: str
    config: Mapping[str, Any]
    created: str
    version: str
    shard: int = 0
    parent: int | None = None
    run: str | None = None
    hparams: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.user}@{self.revision}"

    @property
    def shown(self) -> str:
        """`name` as a message may print it."""
        return f"{shown(self.user)}@{self.revision}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Manifest":
        return cls(**record)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserRecord:
    """The pointers of one user. promoted: the revision that serving should follow, None until one is chosen."""

    user: str
    latest: int
    promoted: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "UserRecord":
        return cls(**record)


def now() -> str:
    """The time in UTC as ISO 8601, to the millisecond."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
