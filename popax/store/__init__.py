"""Durable state: the catalog of revisions, training checkpoints, and one user taken out of either."""

from popax.store.catalog import Catalog, Commit
from popax.store.layout import RowLayout
from popax.store.manifest import Manifest, UserRecord

__all__ = ["Catalog", "Commit", "Manifest", "RowLayout", "UserRecord"]
