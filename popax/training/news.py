"""Who has something new to learn: from digests in the dataset's index and in the catalog, without reading text."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from popax.adapters.base import AdapterConfig
from popax.data.digest import digest_of_users
from popax.data.users import UserDataset
from popax.errors import CorruptRevisionError
from popax.store.catalog import Catalog
from popax.store.manifest import Manifest, UserRecord

# A user's latest manifest, None for who has none, or why it cannot be read.
Latest = Manifest | CorruptRevisionError | None
AT_ONCE = 1024  # records of users read together: their number bounds what is in memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataIdentity:
    """The text of a run: digest over its users and what each wrote, and how much it is, for a message."""

    digest: str
    users: int
    examples: int

    @classmethod
    def of(cls, dataset: UserDataset, users: Sequence[str]) -> "DataIdentity":
        """Of these users, in any order."""
        names, counts = sorted(users), dataset.counts()
        digest = digest_of_users(dataset.digests(names), names)
        return cls(digest=digest, users=len(names), examples=sum(counts[user] for user in names))

    def __str__(self) -> str:
        return f"{self.users} users with {self.examples} examples ({self.digest[:12]})"


def data_provenance(dataset: UserDataset, user: str) -> dict[str, Any]:
    """How many examples a user has, from when to when, and their digest: equal digests mean nothing new to learn."""
    examples = dataset.examples(user)
    times = [str(example.time) for example in (*examples[:1], *examples[-1:]) if example.time is not None]
    digest = dataset.digests([user])[user]
    return {"examples": len(examples), "digest": digest, **({"range": times} if times else {})}


def together_provenance(dataset: UserDataset, users: Sequence[str]) -> dict[str, Any]:
    """Of an adapter that is trained on all of their text: how many they are, and the digest over each one's digest."""
    digest, counts = digest_of_users(dataset.digests(users), users), dataset.counts()
    return {"users": len(users), "examples": sum(counts[user] for user in users), "digest": digest}


def users_with_new_data(
    dataset: UserDataset,
    catalog: Catalog,
    users: Sequence[str],
    base_digest: str,
    config: AdapterConfig,
    known: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """The users whose latest revision, if any, is of another base or configuration or of other data than they have.

    known: of users who were left as they are before, the digest of the text ("data") and the revision that they had
    then; they have something new once either differs. A user whose record cannot be read is among the result.
    """
    digests, same_config = dataset.digests(users), _same(config)

    def is_new(user: str, manifest: Latest) -> bool:
        if user in known:
            then = known[user]
            return (then["data"], then["revision"]) != (digests[user], revision_of(manifest))
        if not isinstance(manifest, Manifest) or manifest.base_digest != base_digest or not same_config(manifest):
            return True
        return (manifest.provenance.get("data") or {}).get("digest") != digests[user]

    found = []
    for at in range(0, len(users), AT_ONCE):
        part = users[at : at + AT_ONCE]
        for user, manifest in zip(part, latest_manifests(catalog, part), strict=True):
            if is_new(user, manifest):
                found.append(user)
    return found


def revision_of(latest: Latest) -> int:
    """The number of what `latest_manifests` found: 0 for none, -1 for one that cannot be read."""
    return latest.revision if isinstance(latest, Manifest) else 0 if latest is None else -1


def latest_manifests(catalog: Catalog, users: Sequence[str]) -> list[Latest]:
    """Each user's latest manifest, None for who has none; a broken record is that user's own."""
    try:
        records: Sequence[UserRecord | None] = catalog.records(users)
        return [None if record is None else catalog.latest(record) for record in records]
    except CorruptRevisionError as error:
        if len(users) == 1:
            return [error]
    middle = len(users) // 2
    return [*latest_manifests(catalog, users[:middle]), *latest_manifests(catalog, users[middle:])]


def _same(config: AdapterConfig) -> Callable[[Manifest], bool]:
    """Whether a manifest's configuration is this one; each cohort's record is read into a config once."""
    seen: dict[str, bool] = {}

    def same(manifest: Manifest) -> bool:
        if manifest.cohort not in seen:
            seen[manifest.cohort] = AdapterConfig.from_dict(manifest.config) == config
        return seen[manifest.cohort]

    return same
