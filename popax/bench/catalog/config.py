"""What the catalog's benchmark builds and how often it measures."""

import dataclasses

from popax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchCatalogConfig:
    """users: of small rows, committed `batch` in a transaction, in the order of their ids' hashes (a batch then
    touches neighbouring leaves of the tree, as a bulk load does). large_users: of `lora` rows of rank `rank` on all
    linear layers. loads: single loads that are timed. batch_loads: timed batched loads of `batch_users` each, after
    `warm_loads` that are not. history_revisions: of one user. layouts: numbers of users stored in three ways. audit:
    whether `verify` reads all.
    """

    users: int = 50_000
    batch: int = 10_000
    large_users: int = 1_000
    rank: int = 8
    loads: int = 5_000
    batch_loads: int = 30
    batch_users: int = 1_024
    warm_loads: int = 200
    history_revisions: int = 20
    layouts: tuple[int, ...] = (4, 16, 256)
    audit: bool = True
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "layouts", tuple(self.layouts))
        least = {"users": self.batch_users, "batch": 1, "large_users": 32, "loads": 100, "batch_loads": 3}
        least |= {"batch_users": 1, "history_revisions": 2, "rank": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"BenchCatalogConfig.{name}={getattr(self, name)}: at least {bound}")
