"""Loading a shard of a base, against merely reading as many bytes: seconds, and the host memory that it takes."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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
    `process` is measured. file_bytes: of each file. cold: read from the disk, not from the page cache."""

    meshes: tuple[str, ...] = ("tensor=8", "fsdp=8", "fsdp=2,tensor=4")
    processes: int = 8
    process: int = 1
    rounds: int = 3
    file_bytes: int = 1 << 29
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
            rows.append({"mesh": mesh, **_row(measure_apart(_job(config, directory, mesh)))})
            progress("  ".join(f"{key} {_short(value)}" for key, value in rows[-1].items()))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return figures | {f"{name}_worst": max(row[name] for row in rows) for name in RATIOS}, rows


def measure_apart(job: LoadJob) -> LoadResult:
    """`load_child.measure` in a process of its own, with the devices of the whole mesh. Raises what it names."""
    count = device_count(job.mesh)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
    }
    done = subprocess.run(
        [sys.executable, "-m", "popax.bench.load_child"],
        input=json.dumps(dataclasses.asdict(job)),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ConfigError(
            f"the loading process ended with {done.returncode}: {' / '.join(done.stderr.splitlines()[-5:])}"
        )
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise ConfigError(answer["error"])
    answer |= {name: [Cost(*one) for one in answer[name]] for name in COSTS}
    return LoadResult(**answer)


def _job(config: BenchLoadConfig, directory: Path, mesh: str) -> LoadJob:
    named = ("processes", "process", "rounds", "cold")
    return LoadJob(directory=str(directory), mesh=mesh, **{name: getattr(config, name) for name in named})


def _row(result: LoadResult) -> dict[str, Any]:
    load, read, read_files = (
        np.asarray([(one.seconds, one.cpu_seconds) for one in costs]).T
        for costs in (result.load, result.read, result.read_files)
    )
    seconds = {"load_s": load[0], "read_s": read[0], "read_files_s": read_files[0], "load_cpu_s": load[1]}
    ratios = {
        "load_over_read": load[0] / read[0],
        "load_over_read_cpu": load[1] / read[1],
        "load_over_read_files": load[0] / read_files[0],
    }
    return {
        "shard_bytes": result.shard_bytes,
        "peak_bytes": result.peak_bytes,
        "peak_over_shard": result.peak_bytes / result.shard_bytes,
        **{name: float(np.median(values)) for name, values in (ratios | seconds).items()},
        "load_gb_per_s": result.shard_bytes / float(np.median(load[0])) / 1e9,
        "before_bytes": result.before_bytes,
        "threads": result.threads,
    }


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
