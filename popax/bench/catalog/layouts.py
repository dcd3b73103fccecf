"""The same adapters stored in three ways: packed rows, an array for each tensor, a PEFT directory for each user."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from safetensors.numpy import load_file

from popax.adapters.peft import save_peft
from popax.bench.catalog.config import BenchCatalogConfig
from popax.bench.catalog.population import LARGE, Benchmarked, large_commits, register, user_id
from popax.modeling.config import ModelConfig
from popax.store.catalog import Catalog
from popax.trees import flatten_named

REPEATS = 3


def layouts(place: Path, model: ModelConfig, config: BenchCatalogConfig, scratch: Path) -> Iterator[dict[str, Any]]:
    """A row for each number of users and way of storing: files, bytes, milliseconds to load them all (the median of
    REPEATS, files in the page cache, each time opened anew)."""
    bench = register(place, model, config)
    for count in config.layouts:
        users = [LARGE + user_id(number) for number in range(count)]
        adapters = [adapter for adapter, _ in bench.catalog.load_batch(users)]
        for name, (write, read) in WAYS.items():
            place = scratch / f"{name}-{count}"
            write(bench, config, place, adapters)
            objects, size = _counted(place)
            times = []
            for _ in range(REPEATS):
                began = time.perf_counter()
                loaded = read(place, count)
                times.append(1e3 * (time.perf_counter() - began))
            assert loaded == sum(leaf.nbytes for one in adapters for leaf in flatten_named(one).values())
            yield {
                "users": count,
                "stored as": name,
                "files": objects,
                "bytes": size,
                "load_ms": float(np.median(times)),
            }


def _write_packed(bench: Benchmarked, config: BenchCatalogConfig, place: Path, adapters: list[Any]) -> None:
    catalog = Catalog.open(place, create=True)
    large = bench.large
    cohort = catalog.cohort(large.config, large.specs, large.base_digest, large.layout)
    for at in range(0, len(adapters), 16):
        numbers = list(range(at, min(at + 16, len(adapters))))
        catalog.commit_batch(cohort, list(large_commits(bench, numbers, config)))


def _read_packed(place: Path, count: int) -> int:
    found = Catalog.open(place, read_only=True).load_batch([LARGE + user_id(number) for number in range(count)])
    return sum(leaf.nbytes for adapter, _ in found for leaf in flatten_named(adapter).values())


def _write_tensors(bench: Benchmarked, config: BenchCatalogConfig, place: Path, adapters: list[Any]) -> None:
    """One zarr3 array a tensor and user, in one OCDBT database: how a generic checkpointer stores them."""
    context, writes = ts.Context(), []
    for number, adapter in enumerate(adapters):
        for name, leaf in flatten_named(adapter).items():
            spec = _tensor_spec(place, number, name)
            store = ts.open(spec, create=True, dtype=leaf.dtype, shape=leaf.shape, context=context).result()
            writes.append(store.write(leaf))
    for write in writes:
        write.result()
    _tensor_list(place).write_text("\n".join(flatten_named(adapters[0])))


def _read_tensors(place: Path, count: int) -> int:
    context, names = ts.Context(), _tensor_list(place).read_text().split("\n")
    opened = [ts.open(_tensor_spec(place, number, name), context=context) for number in range(count) for name in names]
    reads = [store.result().read() for store in opened]
    return sum(read.result().nbytes for read in reads)


def _tensor_spec(place: Path, number: int, name: str) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{place}/"}
    return {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{number}/{name}/"}}


def _tensor_list(place: Path) -> Path:
    return place.with_suffix(".names")


def _write_peft(bench: Benchmarked, config: BenchCatalogConfig, place: Path, adapters: list[Any]) -> None:
    for number, adapter in enumerate(adapters):
        save_peft(place / str(number), adapter, config=bench.large.config, specs=bench.large.specs, shared={})


def _read_peft(place: Path, count: int) -> int:
    return sum(
        leaf.nbytes
        for number in range(count)
        for leaf in load_file(place / str(number) / "adapter_model.safetensors").values()
    )


def _counted(place: Path) -> tuple[int, int]:
    files = [os.path.join(folder, name) for folder, _, names in os.walk(place) for name in names]
    return len(files), sum(map(os.path.getsize, files))


WAYS: dict[str, tuple[Callable[..., None], Callable[[Path, int], int]]] = {
    "packed rows": (_write_packed, _read_packed),
    "a tensor an array": (_write_tensors, _read_tensors),
    "PEFT directories": (_write_peft, _read_peft),
}
