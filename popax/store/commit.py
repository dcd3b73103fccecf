"""What a writer hands over for one user: with its bytes, and once these lie in a shard, without."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np

from popax.store.codec import RowCodec
from popax.store.records import as_stored
from popax.types import AdapterState


class CommitFields(TypedDict, total=False):
    """What a commit may say beside its user and adapter: see `Commit`."""

    parent: int | Literal["latest"] | None
    metrics: Mapping[str, Any] | None
    provenance: Mapping[str, Any] | None
    hparams: Mapping[str, Any] | None
    run: str | None
    derived_from: Sequence[tuple[str, int]]
    optimizer: Mapping[str, Any] | None
    codec: RowCodec | str | None


@dataclasses.dataclass(frozen=True)
class Commit:
    """One user's new revision.

    adapter: the tree, or its packed row (uint8 [row_bytes], as `Catalog.pack` makes them for a whole population).
    parent: "latest" continues whatever is latest, a number must be the latest, None must be the user's first. run: see
    `Manifest.run`. derived_from: (user, revision) of each revision that this one was made from. optimizer: a nested
    dict of arrays, kept beside the revision so that its training continues exactly. codec: store the row in another
    form, one of `codec.CODECS` by its name or a `basis.BasisCodec`; what that costs is in the manifest.
    """

    user: str
    adapter: AdapterState | np.ndarray
    _: dataclasses.KW_ONLY
    parent: int | Literal["latest"] | None = "latest"
    metrics: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] | None = None
    hparams: Mapping[str, Any] | None = None
    run: str | None = None
    derived_from: Sequence[tuple[str, int]] = ()
    optimizer: Mapping[str, Any] | None = None
    codec: RowCodec | str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Revision:
    """A commit without its bytes, which are the row `row` of the shard `shard`. Fields as in Commit and Manifest."""

    user: str
    digest: str
    parent: int | Literal["latest"] | None
    run: str | None
    metrics: Mapping[str, Any]
    provenance: Mapping[str, Any]
    hparams: Mapping[str, Any]
    derived_from: tuple[tuple[str, int], ...] = ()
    codec: Mapping[str, Any] | None = None
    optimizer: Mapping[str, Any] | None = None
    row: int = -1
    shard: int = 0

    @classmethod
    def of(cls, commit: Commit, digest: str, codec: Mapping[str, Any] | None = None) -> "Revision":
        """Without a place yet. codec: as the manifest keeps it."""
        return cls(
            user=commit.user,
            digest=digest,
            parent=commit.parent,
            run=commit.run,
            metrics=as_stored(commit.metrics),
            provenance=as_stored(commit.provenance),
            hparams=as_stored(commit.hparams),
            derived_from=tuple((parent, revision) for parent, revision in commit.derived_from),
            codec=codec,
        )

    def placed(self, row: int, shard: int, optimizer: Mapping[str, Any] | None) -> "Revision":
        """This revision with its places. As `dataclasses.replace` does it, without visiting each field."""
        made = object.__new__(Revision)
        made.__dict__.update(self.__dict__, row=row, shard=shard, optimizer=optimizer)
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Revision":
        return cls(**{**record, "derived_from": tuple((parent, at) for parent, at in record["derived_from"])})
