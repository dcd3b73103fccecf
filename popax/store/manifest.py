"""The record of one revision (what the bytes are, for which base, where they came from), and a user's pointers."""

import dataclasses
import datetime
from collections.abc import Mapping
from typing import Any, TypeVar

from popax.store.codec import rows_label
from popax.store.cohort import StoredCohort
from popax.store.packed import StoredManifest
from popax.store.records import optimizer_array, rows_array, shown

T = TypeVar("T")

PROMOTIONS = 8
_none = type(None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """One immutable revision of one user's adapter.

    revision: from 1. parent: the revision it was trained from, None for a first one. cohort: id of the stored
    cohort, whose config and base digest are repeated here. row: index in the cohort's rows of the shard `shard`.
    digest: sha256 of the packed row. created: UTC, ISO 8601. run: the training run that committed it; the same run
    committing the same bytes again is not a new revision. derived_from: [user, revision, digest] of each revision that
    this one was merged, composed, distilled or migrated from. optimizer: {"layout", "digest", "row"} of what
    `load_optimizer` reads, None where the optimizer's state was not kept. signature: see `signing`; None where nobody
    signed it. codec: {"name", "error", ...} of a row that is stored in fewer bits: `digest` is of what is stored, error
    the relative one of what is loaded to what was committed, of the numbers themselves or, in a basis, of the weight
    updates; None for a row that is stored as it is.
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
    # From here on by factories, which leave nothing on the class: what is not there yet then goes to `__getattr__`.
    parent: int | None = dataclasses.field(default_factory=_none)
    run: str | None = dataclasses.field(default_factory=_none)
    derived_from: tuple[tuple[str, int, str], ...] = dataclasses.field(default_factory=tuple)
    optimizer: Mapping[str, Any] | None = dataclasses.field(default_factory=_none)
    signature: Mapping[str, str] | None = dataclasses.field(default_factory=_none)
    codec: Mapping[str, Any] | None = dataclasses.field(default_factory=_none)
    hparams: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.user}@{self.revision}"

    @property
    def array(self) -> str:
        """The array of rows that its row lies in."""
        return rows_array(self.cohort, rows_label(self.codec))

    @property
    def optimizer_array(self) -> str:
        """The array of rows that its optimizer's state lies in; "" without one."""
        return optimizer_array(self.cohort, self.optimizer["layout"]) if self.optimizer else ""

    @property
    def shown(self) -> str:
        """`name` as a message may print it."""
        return f"{shown(self.user)}@{self.revision}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        plain = {name: getattr(self, name) for name in _FIELDS}
        return {**plain, "derived_from": [list(one) for one in self.derived_from]}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Manifest":
        return cls(**{**record, "derived_from": tuple(tuple(parent) for parent in record["derived_from"])})

    @classmethod
    def from_stored(cls, user: str, stored: Mapping[str, Any], cohort: StoredCohort) -> "Manifest":
        """As the database keeps it: what its cohort's record holds is put back. Of a StoredManifest the rest is
        unpacked when somebody asks for it."""
        of_cohort = {"config": cohort.config_record, "base_digest": cohort.base_digest}
        if not isinstance(stored, StoredManifest):
            return _made(cls, {"user": user, **_completed(stored), **of_cohort})
        fields = {"user": user, **stored.fixed, **of_cohort, "_stored": stored}
        if not stored.encoded:
            fields["codec"] = None
        return _made(cls, fields)

    def __getattr__(self, name: str) -> Any:
        """A field that has not been unpacked yet."""
        # It stays: another thread may be asking for another field.
        stored = self.__dict__.get("_stored") if name in _FIELDS else None
        if stored is None:
            raise AttributeError(f"a manifest has no {name!r}")
        for field, value in _completed(stored).items():
            self.__dict__.setdefault(field, value)
        return self.__dict__[name]


def _completed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """All fields but the user's and the cohort's: what says nothing is not stored."""
    parents = tuple((user, at, digest) for user, at, digest in stored.get("derived_from", ()))
    return {**{name: default() for name, default in _DEFAULTS.items()}, **stored, "derived_from": parents}


_FIELDS = tuple(field.name for field in dataclasses.fields(Manifest))
_DEFAULTS = {
    field.name: field.default_factory
    for field in dataclasses.fields(Manifest)
    if field.default_factory is not dataclasses.MISSING
} | {"shard": int}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserRecord:
    """The pointers of one user: revisions `oldest` to `latest` are there.

    promotions: revisions that were promoted, the last of them is the one that serving follows; at most PROMOTIONS are
    remembered. tags: names of revisions. current: the latest revision's manifest as it is stored (see `reader`).
    """

    user: str
    latest: int
    oldest: int = 1
    promotions: tuple[int, ...] = ()
    tags: Mapping[str, int] = dataclasses.field(default_factory=dict)
    current: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def promoted(self) -> int | None:
        """The revision that serving follows, None until one is promoted."""
        return self.promotions[-1] if self.promotions else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values for scripts; `promoted` is among them, the manifest is not."""
        return {
            "user": self.user,
            "latest": self.latest,
            "oldest": self.oldest,
            "promoted": self.promoted,
            "promotions": list(self.promotions),
            "tags": dict(self.tags),
        }

    def stored(self) -> dict[str, Any]:
        """What the database keeps: pointers that say nothing are left out. `from_stored` reads it back."""
        record: dict[str, Any] = {"user": self.user, "latest": self.latest, "manifest": self.current}
        if self.oldest != 1:
            record["oldest"] = self.oldest
        if self.promotions:
            record["promotions"] = self.promotions[-PROMOTIONS:]
        if self.tags:
            record["tags"] = self.tags
        return record

    @classmethod
    def from_stored(cls, record: Mapping[str, Any]) -> "UserRecord":
        fields = {
            "user": record["user"],
            "latest": record["latest"],
            "oldest": record.get("oldest", 1),
            "promotions": tuple(record.get("promotions", ())),
            "tags": record.get("tags", {}),
            "current": record["manifest"],
        }
        return _made(cls, fields)


def _made(cls: type[T], fields: dict[str, Any]) -> T:
    """An instance with these fields. A frozen dataclass's own __init__ sets them one by one, which is a tenth of the
    time that loading a thousand users takes."""
    made = object.__new__(cls)
    object.__setattr__(made, "__dict__", fields)
    return made


def now() -> str:
    """The time in UTC as ISO 8601, to the millisecond."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
