"""The measurements on a catalog that has been built."""

import gc
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from popax.bench.catalog.config import BenchCatalogConfig
from popax.bench.catalog.population import LARGE, bulk_order, commits, large_commits, mark_of, register, user_id
from popax.bench.host_memory import give_back
from popax.errors import CatalogError
from popax.modeling.config import ModelConfig
from popax.store.catalog import Catalog
from popax.store.commit import Commit
from popax.store.extract import extract_to_peft
from popax.store.statistics import directory_bytes

Figures = dict[str, Any]
LARGE_BATCH = 16
IO = Path("/proc/self/io")


def build(place: Path, model: ModelConfig, config: BenchCatalogConfig) -> Figures:
    """Commit all users, or those that an interrupted build has left. The rate is that of the small rows."""
    bench = register(place, model, config)
    _say(f"rows of {bench.small.layout.row_bytes:,} and {bench.large.layout.row_bytes:,} bytes in {place}")
    order = bulk_order(config.users)
    settle()
    start, seconds = _committed(bench.catalog, order), 0.0
    for at in range(start, len(order), config.batch):
        batch = commits(bench, order[at : at + config.batch].tolist(), config)
        began = time.perf_counter()
        bench.catalog.commit_batch(bench.small, batch)
        seconds += time.perf_counter() - began
        if at // config.batch % 10 == 9:
            _say(f"{at + len(batch):,} of {len(order):,} users, {(at + len(batch) - start) / seconds:,.0f} revisions/s")
    small_bytes = directory_bytes(place)
    large = [number for number in range(config.large_users) if not bench.catalog.exists(LARGE + user_id(number))]
    for at in range(0, len(large), LARGE_BATCH):
        bench.catalog.commit_batch(bench.large, list(large_commits(bench, large[at : at + LARGE_BATCH], config)))
    packed = len(order) * bench.small.layout.row_bytes
    return {
        "users": len(order),
        "row_bytes": bench.small.layout.row_bytes,
        "large_users": config.large_users,
        "large_row_bytes": bench.large.layout.row_bytes,
        "revisions_per_s": (len(order) - start) / seconds if seconds else None,
        "build_s": seconds,
        "overhead_bytes_per_user": None if start else (small_bytes - packed) / len(order),
    }


def open_and_load(place: Path, config: BenchCatalogConfig) -> Figures:
    """Opening, then single and batched loads of random users, each checked to be that user's own."""
    began = time.perf_counter()
    catalog = Catalog.open(place, read_only=True)
    assert catalog.exists(user_id(0))
    opened = time.perf_counter() - began
    rng = np.random.default_rng([config.seed, 2])
    for _ in range(config.warm_loads):  # as in a server that has run for a while
        catalog.load_batch([user_id(number) for number in rng.integers(config.users, size=config.batch_users)])
    settle()
    single_ms, batch_ms, wrong = [], [], 0
    for number in rng.integers(config.users, size=config.loads).tolist():
        began = time.perf_counter()
        adapter, _ = catalog.load(user_id(number))
        single_ms.append(1e3 * (time.perf_counter() - began))
        wrong += mark_of(adapter) != number
    for _ in range(config.batch_loads):
        numbers = rng.integers(config.users, size=config.batch_users)
        users = [user_id(number) for number in numbers]
        began = time.perf_counter()
        stacked, _ = catalog.load_stacked(users)
        batch_ms.append(1e3 * (time.perf_counter() - began))
        first = next(iter(next(iter(stacked.values())).values()))
        wrong += int((first.reshape(len(numbers), -1)[:, 0] != numbers).sum())
    return {
        "open_s": opened,
        "load_p50_ms": float(np.percentile(single_ms, 50)),
        "load_p99_ms": float(np.percentile(single_ms, 99)),
        f"batched_{config.batch_users}_ms": float(np.median(batch_ms)),
        "wrong_adapters": wrong,
    }


def load_large(place: Path, config: BenchCatalogConfig) -> Figures:
    """Megabytes (10^6) a second of large rows, 32 users at a time, in random order, digests checked."""
    catalog = Catalog.open(place, read_only=True)
    order = np.random.default_rng([config.seed, 3]).permutation(config.large_users)
    total, seconds = 0, 0.0
    for at in range(0, len(order) - 31, 32):
        users = [LARGE + user_id(number) for number in order[at : at + 32]]
        began = time.perf_counter()
        found = catalog.load_batch(users)
        seconds += time.perf_counter() - began
        total += sum(catalog.cohort_of(manifest).layout.row_bytes for _, manifest in found)
    return {"large_mb_per_s": total / 1e6 / seconds}


def one_history(place: Path, config: BenchCatalogConfig) -> Figures:
    """Milliseconds for all manifests of a user of `history_revisions` revisions."""
    catalog, user = Catalog.open(place), user_id(0)
    adapter, manifest = catalog.load(user)
    cohort = catalog.cohort_of(manifest)
    row = cohort.layout.pack(adapter)
    for _ in range(manifest.revision, config.history_revisions):
        row[-1] ^= 1
        catalog.commit_batch(cohort, [Commit(user, row, metrics={"steps": 200})])
    times = []
    for _ in range(100):
        began = time.perf_counter()
        found = catalog.history(user)
        times.append(1e3 * (time.perf_counter() - began))
    return {"history_ms": float(np.median(times)), "history_revisions": len(found)}


def extract_one(place: Path, config: BenchCatalogConfig, scratch: Path) -> Figures:
    """A PEFT directory of one user, from a catalog opened anew: the median of ten, and bytes read beside the row's."""
    figures: Figures = {}
    for name, prefix in (("extract", ""), ("extract_large", LARGE)):
        times, read = [], []
        for number in range(10):
            user = prefix + user_id(number * 31 % config.large_users)
            before, began = _bytes_read(), time.perf_counter()
            extract_to_peft(place, user, scratch / f"{name}-{number}")
            times.append(1e3 * (time.perf_counter() - began))
            read.append(_bytes_read() - before)
        figures |= {f"{name}_ms": float(np.median(times)), f"{name}_read_bytes": float(np.median(read))}
    return figures


def audit(place: Path, config: BenchCatalogConfig) -> Figures:
    """Every revision, read and checked."""
    if not config.audit:
        return {}
    began = time.perf_counter()
    parts = iter(range(10**9))
    found = Catalog.open(place, read_only=True).verify(
        progress=lambda users: _say(f"{users:,} users audited") if next(parts) % 32 == 31 else None
    )
    if not found.clean or found.orphan_rows:
        raise CatalogError(
            f"the audit of {os.fspath(place)!r} found {found.problem_count} problems: {found.problems[:3]}"
        )
    seconds = time.perf_counter() - began
    return {"audit_s": seconds, "audited_revisions": found.revisions, "audited_rows": found.rows}


def settle() -> None:
    """What is in memory by now stays: the collector need not look through all modules' objects again and again, which
    costs a third of the time of commits and loads. A server does the same when it is ready. What is free is given
    back."""
    gc.collect()
    gc.freeze()
    give_back()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _committed(catalog: Catalog, order: np.ndarray) -> int:
    """How many users are there: they were committed in this order, in whole batches."""
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if catalog.exists(user_id(int(order[middle]))) else (low, middle)
    return low


def _bytes_read() -> int:
    """What this process has read from files so far, in system calls, cached by the kernel or not."""
    return int(IO.read_text().split("rchar:")[1].split()[0])
