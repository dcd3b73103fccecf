"""One process of a larger mesh loads its shard of a base: what it takes beside merely reading as many bytes.

`python -m popax.bench.load_child JOB`, a `LoadJob` as JSON, writes a `LoadResult` as JSON to standard output, or
{"error": message} for what a user can cause. It is a process of its own because memory that a process once had counts
in its peak, and because it has as many devices as the whole mesh.
"""

import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from popax.bench.host_memory import peak_resident_bytes, reset_peak, resident_bytes
from popax.distributed.bootstrap import ProcessConfig, several_processes
from popax.errors import PopaxError
from popax.modeling import hf
from popax.modeling.model import Model
from popax.modeling.stored_weights import StoredWeights
from popax.sharding import make_mesh

READ_BYTES = 1 << 23


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadJob:
    """mesh: as `--mesh`, over all processes' devices; of these, process `process` of `processes` has its equal part.

    coordinator: where the processes meet, which then load together; None: this one alone does what it would do among
    them, without the exchange. exchange: it reads its share of the rows, not what it wants in the end. cold: the files
    leave the page cache before each measurement, so that it reads the disk.
    """

    directory: str
    mesh: str
    processes: int
    process: int
    rounds: int
    cold: bool
    exchange: bool = False
    coordinator: str | None = None


class Cost(NamedTuple):
    """Of one round: seconds, and processor seconds of all threads."""

    seconds: float
    cpu_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadResult:
    """peak_bytes: the most resident while loading for the first time, above what was resident before; the shard, which
    CPU devices have in the host's memory, is part of it. load: of the shard; read: of as many bytes into new memory;
    read_files: of all the files, keeping nothing; measured in turns, round after round."""

    shard_bytes: int
    peak_bytes: int
    before_bytes: int
    threads: int
    load: list["Cost"]
    read: list["Cost"]
    read_files: list["Cost"]


def measure(job: LoadJob) -> LoadResult:
    """Load once for the memory, then load and read in turns. Raises what loading raises."""
    if job.coordinator is None:
        return _measure(job, make_mesh(job.mesh), lambda: None)
    process = ProcessConfig(coordinator=job.coordinator, num_processes=job.processes, process_id=job.process)
    with several_processes(process) as group:
        return _measure(job, make_mesh(job.mesh), group.barrier)


def _measure(job: LoadJob, mesh: Mesh, meet: Callable[[], None]) -> LoadResult:
    model = Model(hf.read_config(Path(job.directory)))
    weights = hf.open_weights(Path(job.directory), model)
    files = sorted({part.file for source in weights.sources.values() for t in source.tensors for part in t.stored})
    jax.block_until_ready(jax.device_put(np.zeros(1), jax.local_devices()[0]))
    meet()
    gc.collect()
    before = resident_bytes()
    reset_peak()
    shard_bytes = _load(job, weights, mesh)
    peak = peak_resident_bytes() - before
    threads = ThreadPoolExecutor()._max_workers
    works = {
        "read": lambda: _read_kept(files, shard_bytes, threads),
        "load": lambda: _load(job, weights, mesh),
        "read_files": lambda: _read_all(files, threads),
    }
    costs = {name: [] for name in works}
    for _ in range(job.rounds):
        for name, work in works.items():
            if job.cold:
                _leave_page_cache(files)
            gc.collect()
            meet()
            started, cpu = time.perf_counter(), time.process_time()
            work()
            costs[name].append(Cost(time.perf_counter() - started, time.process_time() - cpu))
    return LoadResult(shard_bytes=shard_bytes, peak_bytes=peak, before_bytes=before, threads=threads, **costs)


def _load(job: LoadJob, weights: StoredWeights, mesh: Mesh) -> int:
    """Bytes of the shards; a buffer that several devices share counts once."""
    if job.coordinator is not None:
        params, _ = weights.load(mesh=mesh)
        arrays = [shard.data for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    else:
        each = mesh.devices.size // job.processes
        devices = list(mesh.devices.flat)[job.process * each : (job.process + 1) * each]
        shards, _ = weights.load_shards(mesh, devices, exchange=job.exchange)
        arrays = [array for own in shards.values() for array in own.values()]
    return sum({array.unsafe_buffer_pointer(): array.nbytes for array in arrays}.values())


def _read_kept(files: Sequence[Path], nbytes: int, threads: int) -> None:
    """Read so many bytes of the files, one file after the other, into memory that is new and stays."""
    target, jobs, at = np.empty(nbytes, np.uint8), [], 0
    for file in files:
        size = file.stat().st_size
        for offset in range(0, min(size, nbytes - at), READ_BYTES):
            count = min(READ_BYTES, size - offset, nbytes - at)
            jobs.append((file, offset, target[at : at + count]))
            at += count
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_read_into, jobs))


def _read_all(files: Sequence[Path], threads: int) -> None:
    """Read all of the files, keeping nothing."""
    parts = [(file, offset) for file in files for offset in range(0, file.stat().st_size, READ_BYTES)]

    def read(mine: Sequence[tuple[Path, int]]) -> None:
        room = np.empty(READ_BYTES, np.uint8)
        for file, offset in mine:
            _read_into((file, offset, room))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, [parts[start::threads] for start in range(threads)]))


def _read_into(job: tuple[Path, int, np.ndarray]) -> None:
    file, offset, target = job
    with file.open("rb", buffering=0) as stream:
        os.preadv(stream.fileno(), [target.data], offset)


def _leave_page_cache(files: Sequence[Path]) -> None:
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> int:
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not get between the answer's lines
    try:
        result = dataclasses.asdict(measure(LoadJob(**json.loads(sys.argv[1]))))
    except PopaxError as error:
        result = {"error": str(error)}
    json.dump(result, answer)
    answer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
