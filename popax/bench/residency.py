"""Residency measured: a trace of requests by popularity through slots, host tier and catalog, and cold crowds."""

import collections
import dataclasses
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from popax.bench.catalog.config import BenchCatalogConfig
from popax.bench.catalog.measure import settle
from popax.bench.catalog.population import bulk_order, commits, mark_of, register, user_id
from popax.bench.host_memory import peak_resident_bytes
from popax.errors import ConfigError
from popax.modeling.config import ModelConfig
from popax.residency import Request, Residency
from popax.store.catalog import Catalog

Figures = dict[str, Any]
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchResidencyConfig:
    """requests: of a Zipf trace (exponent `zipf`) over `users`, one after the other. host_users: rows that the host
    tier's budget holds. check_every: each so-manieth answer is compared with the catalog's own bytes. cold: crowds of
    so many distinct cold users, `repeats` times each. waiters: threads that ask for one cold user."""

    users: int = 100_000
    requests: int = 100_000
    zipf: float = 1.1
    slots: int = 64
    host_users: int = 512
    check_every: int = 50
    cold: tuple[int, ...] = (16, 256)
    repeats: int = 7
    waiters: int = 1_000
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "cold", tuple(self.cold))
        if min(self.users, self.requests, self.slots, self.check_every, self.repeats, self.waiters) < 1:
            raise ConfigError(f"{self}: at least one of each")
        if self.users < 4 * max(self.cold):
            raise ConfigError(
                f"users={self.users}, cold={self.cold}: four times as many users as are asked for at once"
            )


def bench_residency(
    model: ModelConfig, config: BenchResidencyConfig, *, place: Path | None = None, say: Say = lambda line: None
) -> Figures:
    """place: of the catalog, which is built where it is not there."""
    with tempfile.TemporaryDirectory(prefix="popax-bench-residency-") as folder:
        home = place or Path(folder) / "catalog"
        _build(home, model, config, say)
        settle()
        figures = _trace(home, config, say)
        figures |= _crowds(home, config, say)
        figures |= _one_cold_user(home, config)
        return {**figures, "peak_bytes": peak_resident_bytes()}


def _build(home: Path, model: ModelConfig, config: BenchResidencyConfig, say: Say) -> None:
    bench = register(home, model, BenchCatalogConfig(users=max(config.users, 1024)))
    catalog = bench.catalog
    order = bulk_order(config.users)
    if catalog.exists(user_id(int(order[-1]))):
        return
    for at in range(0, len(order), 10_000):
        batch = commits(bench, order[at : at + 10_000].tolist(), BenchCatalogConfig())
        catalog.commit_batch(bench.small, batch)
        say(f"{at + len(batch):,} of {len(order):,} users")


def _open(home: Path, config: BenchResidencyConfig, slots: int) -> tuple[Catalog, Residency]:
    catalog = Catalog.open(home, read_only=True)
    cohort = catalog.cohort_of(catalog.load(user_id(0))[1])
    host_bytes = config.host_users * cohort.layout.row_bytes
    return catalog, Residency(catalog, cohort, slots=slots, host_bytes=host_bytes)


def _trace(home: Path, config: BenchResidencyConfig, say: Say) -> Figures:
    """Hit rates beside those of two LRUs that are simulated, and answers beside the catalog's."""
    numbers = zipf_trace(config)
    simulated = simulated_hits(numbers, config.slots, config.host_users)
    catalog, residency = _open(home, config, config.slots)
    layout, wrong, checked, compiled = residency.stored.layout, 0, 0, []
    with residency:
        with residency.lease([Request(user_id(0))]) as lease:
            _slot_row(residency, layout, lease.slots[0])
        before = residency.counters()

        def note(event: str, duration_secs: float, **details: Any) -> None:
            compiled.append(event)

        jax.monitoring.register_event_duration_secs_listener(note)
        began = time.perf_counter()
        for at, number in enumerate(numbers.tolist()):
            with residency.lease([Request(user_id(number))]) as lease:
                if at % config.check_every == 0:
                    adapter, manifest = catalog.load(user_id(number))
                    checked += 1
                    wrong += mark_of(adapter) != number or lease.manifests[0] != manifest
                    wrong += bool((_slot_row(residency, layout, lease.slots[0]) != layout.pack(adapter)).any())
            if at % 20_000 == 19_999:
                say(f"{at + 1:,} of {config.requests:,} requests, {(at + 1) / (time.perf_counter() - began):,.0f}/s")
        seconds = time.perf_counter() - began
        jax.monitoring.clear_event_listeners()
        after = residency.counters()
    device_hits = after.device.hits - before.device.hits
    host_hits, host_misses = after.host.hits - before.host.hits, after.host.misses - before.host.misses
    return {
        "users": config.users,
        "requests": config.requests,
        "requests_per_s": config.requests / seconds,
        "device_hit_rate": device_hits / config.requests,
        "simulated_device_hit_rate": simulated[0],
        "host_hit_rate": host_hits / max(host_hits + host_misses, 1),
        "simulated_host_hit_rate": simulated[1],
        "catalog_loads": after.catalog.loads - before.catalog.loads,
        "device_evictions": after.device.evictions - before.device.evictions,
        "recompilations": sum("compile" in name for name in compiled),
        "checked": checked,
        "wrong": wrong,
    }


def _slot_row(residency: Residency, layout: Any, slot: int) -> np.ndarray:
    """What the device holds in this slot, packed."""
    layers = residency.cohort.layered
    host = jax.device_get(residency.adapters)
    return layout.pack(
        {
            site: {name: leaf[:, slot] if layers[site] else leaf[slot] for name, leaf in leaves.items()}
            for site, leaves in host.items()
        }
    )


def zipf_trace(config: BenchResidencyConfig) -> np.ndarray:
    """User numbers [requests], rank r drawn with probability ~ 1 / r^zipf, ranks spread over all users."""
    rng = np.random.default_rng(config.seed)
    weights = 1.0 / np.arange(1, config.users + 1) ** config.zipf
    ranks = rng.choice(config.users, size=config.requests, p=weights / weights.sum())
    return rng.permutation(config.users)[ranks]


def simulated_hits(numbers: np.ndarray, slots: int, host_users: int) -> tuple[float, float]:
    """(device, host) hit rates of two plain LRUs, the second asked where the first misses."""
    device: collections.OrderedDict[int, None] = collections.OrderedDict()
    host: collections.OrderedDict[int, None] = collections.OrderedDict()
    hits, host_hits = 0, 0
    for number in numbers.tolist():
        if number in device:
            hits += 1
            device.move_to_end(number)
            continue
        if len(device) == slots:
            device.popitem(last=False)
        device[number] = None
        if number in host:
            host_hits += 1
            host.move_to_end(number)
            continue
        if len(host) == host_users:
            host.popitem(last=False)
        host[number] = None
    return hits / len(numbers), host_hits / max(len(numbers) - hits, 1)


def _crowds(home: Path, config: BenchResidencyConfig, say: Say) -> Figures:
    """Distinct cold users, asked for in one instant, until they are in their slots, over one batched read of as many
    others: the median of the ratio. A line of single reads would make it as long as the crowd."""
    figures: Figures = {}
    rng = np.random.default_rng([config.seed, 1])
    for count in config.cold:
        catalog, residency = _open(home, config, count)
        ratios, reads = [], []
        with residency:
            _warm(catalog, residency, config, rng, count)
            for _ in range(config.repeats):
                crowd, others = rng.choice(config.users, size=(2, count), replace=False)
                began = time.perf_counter()
                catalog.load_stacked([user_id(number) for number in others])
                read = time.perf_counter() - began
                reads.append(read)
                ratios.append(_all_at_once(residency, crowd.tolist()) / read)
        figures[f"cold_{count}_over_one_read"] = statistics.median(ratios)
        figures[f"one_read_of_{count}_ms"] = 1e3 * statistics.median(reads)
        say(f"{count} cold users at once: {statistics.median(ratios):.2f} of one batched read")
    return figures


def _warm(catalog: Catalog, residency: Residency, config: BenchResidencyConfig, rng: Any, count: int) -> None:
    """The catalog's nodes are in memory, the users' rows are not."""
    for _ in range(40):
        catalog.load_stacked([user_id(number) for number in rng.integers(config.users, size=1024)])
    _all_at_once(residency, rng.choice(config.users, size=count, replace=False).tolist())


def _all_at_once(residency: Residency, numbers: list[int]) -> float:
    """Seconds until the rows of all these users, asked for in one instant, are in their slots."""
    began = time.perf_counter()
    with residency.lease([Request(user_id(number)) for number in numbers]):
        return time.perf_counter() - began


def _one_cold_user(home: Path, config: BenchResidencyConfig) -> Figures:
    """Loads that so many threads cause which ask for one cold user at once."""
    _, residency = _open(home, config, config.slots)
    wanted, together = [Request(user_id(config.users - 1))], threading.Barrier(config.waiters)

    def ask() -> None:
        together.wait()
        with residency.lease(wanted):
            return

    with residency:
        threads = [threading.Thread(target=ask) for _ in range(config.waiters)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"waiters": config.waiters, "one_cold_user_loads": residency.counters().catalog.loads}
