"""The users of the serving benchmarks."""

import functools
from pathlib import Path

import jax
import numpy as np

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.bench.serve.config import BenchServeConfig
from popax.modeling.base import Base
from popax.store.catalog import Catalog
from popax.store.commit import Commit
from popax.store.layout import RowLayout

AT_ONCE = 16


def user_id(number: int) -> str:
    """The name of a user."""
    return f"user-{number:06d}"


def fill_catalog(place: Path, base: Base, config: BenchServeConfig) -> tuple[Catalog, int]:
    """(a catalog of `users` users with random `lora` adapters for this base, the bytes of a row)."""
    adapter, rng = AdapterConfig(method="lora", rank=config.rank), np.random.default_rng(config.seed)
    cohort = Cohort.of(adapter, base.model.sites())
    layout = RowLayout.of(cohort.abstract())
    catalog = Catalog.open(place, create=True)
    stored = catalog.cohort(adapter, cohort.specs, base.digest, layout, None)
    for at in range(0, config.users, AT_ONCE):
        numbers = range(at, min(at + AT_ONCE, config.users))
        stack = jax.tree.map(functools.partial(_random, rng, len(numbers)), cohort.abstract())
        rows = catalog.pack(stored, stack)
        catalog.commit_batch(
            stored, [Commit(user_id(n), row, parent=None) for n, row in zip(numbers, rows, strict=True)]
        )
    return catalog, layout.row_bytes


def _random(rng: np.random.Generator, count: int, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    return 0.02 * rng.standard_normal((count, *leaf.shape), np.float32)
