"""The users of the catalog's benchmark: ids in bulk order, small and large rows, each marked with its user's number."""

import concurrent.futures
import dataclasses
import hashlib
import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from popax.adapters.base import AdapterConfig, TargetRule
from popax.adapters.cohort import Cohort
from popax.bench.catalog.config import BenchCatalogConfig
from popax.modeling.base import new_base
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.store.catalog import Catalog
from popax.store.cohort import StoredCohort
from popax.store.commit import Commit
from popax.store.layout import RowLayout
from popax.types import AdapterState

SMALL_TARGETS = (TargetRule(pattern=r"layers\.attn\.[qv]_proj"),)
LARGE = "large/"
# Who only writes has no use for the nodes of a million users.
WRITER_CACHE_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Benchmarked:
    """The catalog with its two cohorts: `lora_xs` cores of two sites, `lora` factors of all linear layers."""

    catalog: Catalog
    small: StoredCohort
    large: StoredCohort


def register(place: Path, model: ModelConfig, config: BenchCatalogConfig) -> Benchmarked:
    """Both cohorts, for a base of random weights, in a catalog that is made where there is none.

    A process of its own does it, as a run that trained them would have: the base, its decomposition and the compiler's
    memory are not part of what is measured.
    """
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        digest = child.submit(_register, place, model, config).result()
    catalog = Catalog.open(place, context=ts.Context({"cache_pool": {"total_bytes_limit": WRITER_CACHE_BYTES}}))
    small, large = (_found(catalog, Model(model), adapter, digest) for adapter in _adapters(config))
    assert small is not None
    assert large is not None
    return Benchmarked(catalog, small, large)


def _adapters(config: BenchCatalogConfig) -> tuple[AdapterConfig, AdapterConfig]:
    small = AdapterConfig(method="lora_xs", rank=config.rank, targets=SMALL_TARGETS)
    return small, AdapterConfig(method="lora", rank=config.rank)


def _found(catalog: Catalog, model: Model, adapter: AdapterConfig, digest: str) -> StoredCohort | None:
    layout = RowLayout.of(Cohort.of(adapter, model.sites()).abstract())
    return catalog.find_cohort(adapter, digest, layout)


def _register(place: Path, model: ModelConfig, config: BenchCatalogConfig) -> str:
    """The base's digest. The shared basis of the small cohort is that base's own."""
    catalog, net = Catalog.open(place, create=True), Model(model)
    base = new_base(net, net.init(jax.random.key(config.seed)), source="random weights")
    for adapter in _adapters(config):
        if _found(catalog, net, adapter, base.digest) is None:
            cohort = Cohort.of(adapter, net.sites())
            shared = jax.tree.map(np.asarray, cohort.shared(*net.site_arrays(base.params)))
            layout = RowLayout.of(cohort.abstract())
            catalog.cohort(adapter, cohort.specs, base.digest, layout, shared or None)
    return base.digest


def user_id(number: int) -> str:
    """Tenants of a thousand users each."""
    return f"tenant-{number // 1000:04d}/user-{number:07d}"


def bulk_order(count: int) -> np.ndarray:
    """0 .. count - 1 in the order in which their users' keys are sorted; 16 bytes a user, not an object."""
    digests = b"".join(hashlib.sha256(user_id(number).encode()).digest()[:8] for number in range(count))
    return np.argsort(np.frombuffer(digests, ">u8"), kind="stable")


def commits(bench: Benchmarked, numbers: Sequence[int], config: BenchCatalogConfig) -> list[Commit]:
    """The first revisions of these users of the small cohort, with as much beside them as training writes."""
    rng = np.random.default_rng([config.seed, int(numbers[0])])
    rows_NxB = bench.catalog.pack(bench.small, _random_stack(bench.small.layout, numbers, rng))
    losses_N = rng.uniform(0.5, 2.0, len(numbers))
    return [
        Commit(
            user_id(number),
            row,
            parent=None,
            run="bench",
            metrics={"bits_per_byte": round(loss, 6), "steps": 200, "skipped": 0},
            provenance={"data": {"examples": int(number) % 97 + 3, "digest": _text_digest(number)}, "seed": 0},
            hparams={"learning_rate": 0.001, "clip_norm": 1.0},
        )
        for number, row, loss in zip(numbers, rows_NxB, losses_N.tolist(), strict=True)
    ]


def large_commits(bench: Benchmarked, numbers: Sequence[int], config: BenchCatalogConfig) -> Iterator[Commit]:
    """Of the large cohort."""
    rng = np.random.default_rng([config.seed, int(numbers[0]), 1])
    stack = _random_stack(bench.large.layout, numbers, rng)
    for number, row in zip(numbers, bench.catalog.pack(bench.large, stack), strict=True):
        yield Commit(f"{LARGE}{user_id(number)}", row, parent=None, run="bench", metrics={"steps": 200})


def mark_of(adapter: AdapterState) -> int:
    """The number that was written into a user's row: which user's it is."""
    first = next(iter(next(iter(adapter.values())).values()))
    return int(np.asarray(first).reshape(-1)[0])


def _random_stack(layout: RowLayout, numbers: Sequence[int], rng: np.random.Generator) -> AdapterState:
    tree: dict[str, dict[str, Any]] = {}
    for index, leaf in enumerate(layout.leaves):
        site, name = leaf.name.rsplit("/", 1)
        values = rng.standard_normal((len(numbers), *leaf.shape), np.float32)
        if index == 0:
            values.reshape(len(numbers), -1)[:, 0] = numbers
        tree.setdefault(site, {})[name] = values
    return tree


def _text_digest(number: int) -> str:
    return hashlib.sha256(f"text of {number}".encode()).hexdigest()
