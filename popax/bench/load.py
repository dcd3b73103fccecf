"""Loading a shard of a base, against merely reading as many bytes: seconds, and the host memory that it takes."""

import dataclasses
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from popax.bench.load_child import Cost, LoadJob, LoadResult
from popax.bench.weight_files import write_random_weights
from popax.errors import ConfigError
from popax.modeling import hf
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model

COSTS = ("load", "read", "read_files")
RATIOS = ("peak_over_shard", "load_over_read", "load_over_read_cpu", "load_over_read_files")
SETTLED_S = 2.5  # younger files are hashed, and not noted


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchLoadConfig:
    """meshes: as `--mesh`, one device a process or more; processes: how many the mesh is shared out over, of which
    `process` is measured: alone, reading what it wants in the end and reading its share of the rows. together: all of
    them run and exchange; the slowest and the largest is reported. file_bytes: of each file. cold: read from the disk,
    not from the page cache."""

    meshes: tuple[str, ...] = ("tensor=8", "fsdp=8", "fsdp=2,tensor=4")
    processes: int = 8
    process: int = 1
    rounds: int = 3
    file_bytes: int = 1 << 29
    together: bool = False
    cold: bool = False
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "meshes", tuple(self.meshes))
        if not 0 <= self.process < self.processes:
            raise ConfigError(f"process={self.process} of processes={self.processes}: 0 to one below it")
        if self.rounds < 1 or self.file_bytes < 1 or not self.meshes:
            raise ConfigError(
                f"rounds={self.rounds}, file_bytes={self.file_bytes}, meshes={self.meshes}: at least one of each"
            )
        for mesh in self.meshes:
            if device_count(mesh) % self.processes:
                raise ConfigError(
                    f"mesh {mesh!r} of {device_count(mesh)} devices, {self.processes} processes: a multiple"
                )


def device_count(mesh: str) -> int:
    """The devices of a mesh as `--mesh` has it. Raises ConfigError where it is none."""
    sizes = [part.partition("=")[2] for part in mesh.split(",")]
    if not all(size.strip().isdigit() for size in sizes):
        raise ConfigError(f"mesh {mesh!r}: AXIS=SIZE,... such as fsdp=2,tensor=4")
    return math.prod(int(size) for size in sizes)


def bench_load(
    model: ModelConfig,
    config: BenchLoadConfig,
    *,
    place: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(figures, a row for each mesh). place: where the files are written, which are removed again."""
    directory = Path(tempfile.mkdtemp(prefix="popax-bench-load-", dir=place))
    try:
        progress(f"writing {Model(model).num_params:,} random weights to {directory}")
        files = write_random_weights(directory, model, file_bytes=config.file_bytes, seed=config.seed)
        nbytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        progress(f"hashing {files} files, {nbytes / 1e9:.2f} GB")
        time.sleep(SETTLED_S)
        started = time.perf_counter()
        hf.open_weights(directory, Model(hf.read_config(directory))).digest()
        figures = {"files": files, "files_bytes": nbytes, "digest_once_s": time.perf_counter() - started}
        rows = []
        for mesh in config.meshes:
            for how, jobs in _jobs(config, directory, mesh).items():
                rows.append({"mesh": mesh, "reads": how, **_row(measure_apart(jobs))})
                progress("  ".join(f"{key} {_short(value)}" for key, value in rows[-1].items()))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return figures | {f"{name}_worst": max(row[name] for row in rows) for name in RATIOS}, rows


def measure_apart(jobs: Sequence[LoadJob]) -> list[LoadResult]:
    """`load_child.measure` of each job in a process of its own, all at once. Raises ConfigError where one fails."""
    processes = [_start(job) for job in jobs]
    written = [process.communicate() for process in processes]
    results = []
    for process, (output, errors) in zip(processes, written, strict=True):
        if process.returncode:
            last = " / ".join(errors.splitlines()[-5:])
            raise ConfigError(f"a loading process ended with {process.returncode}: {last}")
        answer = json.loads(output)
        if "error" in answer:
            raise ConfigError(answer["error"])
        results.append(LoadResult(**answer | {name: [Cost(*one) for one in answer[name]] for name in COSTS}))
    return results


def _start(job: LoadJob) -> subprocess.Popen:
    """The child: it has the devices of the whole mesh where it is alone, else its part of them."""
    count = device_count(job.mesh) // (1 if job.coordinator is None else job.processes)
    flags = f"--xla_force_host_platform_device_count={count}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "popax.bench.load_child", json.dumps(dataclasses.asdict(job))]
    return subprocess.Popen(command, env=environment, **pipes)


def _jobs(config: BenchLoadConfig, directory: Path, mesh: str) -> dict[str, list[LoadJob]]:
    """{what is read: the jobs of the processes that run for it}."""
    named = {name: getattr(config, name) for name in ("processes", "process", "rounds", "cold")}
    one = LoadJob(directory=str(directory), mesh=mesh, **named)
    if not config.together:
        return {"shard": [one], "rows": [dataclasses.replace(one, exchange=True)]}
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    everyone = range(config.processes)
    return {"rows, exchanged": [dataclasses.replace(one, coordinator=address, process=index) for index in everyone]}


def _row(results: Sequence[LoadResult]) -> dict[str, Any]:
    """Of the processes: the slowest's time in each round, the largest peak beside the smallest shard."""
    load, read, read_files = (np.asarray([getattr(result, name) for result in results]).max(axis=0).T for name in COSTS)
    seconds = {"load_s": load[0], "read_s": read[0], "read_files_s": read_files[0], "load_cpu_s": load[1]}
    ratios = {
        "load_over_read": load[0] / read[0],
        "load_over_read_cpu": load[1] / read[1],
        "load_over_read_files": load[0] / read_files[0],
    }
    shard, peak = min(result.shard_bytes for result in results), max(result.peak_bytes for result in results)
    return {
        "shard_bytes": shard,
        "peak_bytes": peak,
        "peak_over_shard": peak / shard,
        **{name: float(np.median(values)) for name, values in (ratios | seconds).items()},
        "load_gb_per_s": shard / float(np.median(load[0])) / 1e9,
        "before_bytes": max(result.before_bytes for result in results),
        "threads": results[0].threads,
    }


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
