"""A process loads its shard of a base and little beside it, measured by the benchmark's own code."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from popax.bench import load
from popax.bench.host_memory import peak_resident_bytes, reset_peak, resident_bytes
from popax.bench.load import BenchLoadConfig, device_count, measure_apart
from popax.bench.load_child import LoadJob
from popax.bench.weight_files import write_random_weights
from popax.cli.main import main
from popax.errors import ConfigError
from popax.modeling.base import load_base
from popax.modeling.config import ModelConfig

# A strip of 2^20 entries as it is read, converted and turned, at most four bytes each.
STRIPS_BYTES = 12 << 20
SHAPE = {"num_layers": 6, "num_heads": 16, "num_kv_heads": 4, "head_dim": 64, "qk_norm": True}
# 0.17 billion parameters: large beside what a strip of each thread takes.
CONFIG = ModelConfig(**SHAPE, vocab_size=32000, embed_dim=1024, ffw_dim=3072, dtype="bfloat16", param_dtype="bfloat16")
TINY = ModelConfig(
    **SHAPE | {"num_layers": 2}, vocab_size=256, embed_dim=64, ffw_dim=96, rope_theta=1e6, max_seq_len=64
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "base"
    assert write_random_weights(path, CONFIG, file_bytes=1 << 25) > 6
    return path


def test_a_process_has_its_shard_and_little_more(directory):
    """The shard is columns of most of what is stored, rows of the rest; or as many rows, before they are exchanged.

    Beside it are the strips that threads have in hand, which weigh at this size and not at a real one's.
    """
    job = LoadJob(directory=str(directory), mesh="fsdp=2", processes=2, process=1, rounds=1, cold=False)
    total = sum(value.nbytes for file in directory.glob("*.safetensors") for value in load_file(file).values())
    for result in measure_apart([job, dataclasses.replace(job, exchange=True)]):
        assert total / 2 <= result.shard_bytes < 0.51 * total  # norms are in both
        assert result.peak_bytes <= 1.05 * result.shard_bytes + result.threads * STRIPS_BYTES
        assert result.peak_bytes >= 0.9 * result.shard_bytes, "the shard itself is not in the measurement"
        assert len(result.load) == len(result.read) == len(result.read_files) == 1


def test_a_peak_is_seen_and_forgotten():
    before = resident_bytes()
    reset_peak()
    held = np.ones(1 << 23)
    del held
    assert peak_resident_bytes() - before > 60e6
    reset_peak()
    assert peak_resident_bytes() - before < 30e6


def test_random_weights_are_a_base_of_many_files(tmp_path):
    path = tmp_path / "base"
    files = write_random_weights(path, TINY, file_bytes=1 << 17)
    assert files == len(list(path.glob("*.safetensors"))) > 2
    base = load_base(path)
    assert base.model.config == TINY
    kernel = np.asarray(base.params["layers"]["mlp"]["up_proj"]["kernel"])
    assert len(np.unique(kernel)) > 0.9 * kernel.size
    assert 0.01 < kernel.std() < 0.03
    for config in (
        dataclasses.replace(TINY, qk_norm=False),
        dataclasses.replace(TINY, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    ):
        with pytest.raises(ConfigError, match="Qwen3's format"):
            write_random_weights(tmp_path / "other", config, file_bytes=1 << 17)


def test_the_command_reports_figures_and_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "SETTLED_S", 0.0)
    shape = dataclasses.asdict(TINY)
    named = ("vocab_size", "embed_dim", "ffw_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "qk_norm")
    bindings = [f"ModelConfig.{name} = {shape[name]!r}" for name in named]
    bindings += ["BenchLoadConfig.meshes = ('fsdp=2,tensor=2',)", "BenchLoadConfig.processes = 2"]
    bindings += ["BenchLoadConfig.rounds = 1", "BenchLoadConfig.cold = True", "BenchLoadConfig.together = True"]
    arguments = [part for binding in bindings for part in ("--gin_param", binding)]
    place = tmp_path / "place"
    place.mkdir()
    assert main(["bench", "load", *arguments, "--place", str(place), "--json", str(tmp_path / "load.json")]) == 0
    report = json.loads((tmp_path / "load.json").read_text())
    wanted = {"files", "files_bytes", "digest_once_s", "peak_over_shard_worst", "load_over_read_worst"}
    assert wanted <= set(report["figures"])
    (row,) = report["rows"]
    assert (row["mesh"], row["reads"]) == ("fsdp=2,tensor=2", "rows, exchanged")
    assert row["shard_bytes"] > 0
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"process": 8}, "process=8 of processes=8"),
        ({"rounds": 0}, "rounds=0"),
        ({"meshes": ("tensor=4",)}, "of 4 devices, 8 processes"),
        ({"meshes": ("tensor",)}, "AXIS=SIZE"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        BenchLoadConfig(**change)


def test_devices_of_a_mesh():
    assert device_count("fsdp=2,tensor=4") == 8


def test_the_childs_error_is_the_parents(monkeypatch):
    class Child:
        returncode = 0

        def communicate(self):
            return '{"error": "no base to load"}', ""

    monkeypatch.setattr(load, "_start", lambda job: Child())
    job = LoadJob(directory="nowhere", mesh="tensor=2", processes=2, process=0, rounds=1, cold=False)
    with pytest.raises(ConfigError, match="no base to load"):
        measure_apart([job])
    monkeypatch.setattr(Child, "returncode", 3)
    with pytest.raises(ConfigError, match="a loading process ended with 3"):
        measure_apart([job])
