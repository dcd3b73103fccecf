"""Durable state: the catalog of revisions, training checkpoints, and one user taken out of either."""

from popax.store.catalog import Catalog, Commit
from popax.store.difference import difference
from popax.store.export import export_parquet
from popax.store.filters import UserFilter
from popax.store.layout import RowLayout
from popax.store.manifest import Manifest, UserRecord
from popax.store.statistics import statistics

__all__ = [
    "Catalog",
    "Commit",
    "Manifest",
    "RowLayout",
    "UserFilter",
    "UserRecord",
    "difference",
    "export_parquet",
    "statistics",
]
