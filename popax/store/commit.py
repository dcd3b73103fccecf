"""What a writer hands over for one user: with its bytes, and once these lie in a shard, without."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from popax.store.records import as_stored
from popax.types import AdapterState


@dataclasses.dataclass(frozen=True)
class Commit:
    """One user's new revision. parent: "latest" continues whatever is latest, a number must be the latest, None
    must be the user's first. run: see `Manifest.run`."""

    user: str
    adapter: AdapterState
    _: dataclasses.KW_ONLY
    parent: int | Literal["latest"] | None = "latest"
    metrics: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] | None = None
    hparams: Mapping[str, Any] | None = None
    run: str | None = None


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
    row: int = -1
    shard: int = 0

    @classmethod
    def of(cls, commit: Commit, digest: str) -> "Revision":
        """Without a place yet."""
        return cls(
            user=commit.user,
            digest=digest,
            parent=commit.parent,
            run=commit.run,
            metrics=as_stored(commit.metrics),
            provenance=as_stored(commit.provenance),
            hparams=as_stored(commit.hparams),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Revision":
        return cls(**record)
