"""`popax extract` and `popax import`: a user leaves one catalog as a PEFT directory and arrives in another."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from popax.adapters.base import AdapterConfig, TargetRule
from popax.adapters.cohort import Cohort
from popax.cli.main import main
from popax.modeling.base import new_base, save_base
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.store.catalog import Catalog
from popax.store.layout import RowLayout
from popax.trees import flatten_named

CONFIG = ModelConfig(
    vocab_size=32, embed_dim=16, ffw_dim=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, max_seq_len=16
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(base directory, catalog directory, ada's adapter): ada has two revisions of mixed ranks."""
    folder = tmp_path_factory.mktemp("world")
    model = Model(CONFIG)
    base = new_base(model, model.init(jax.random.key(0)), source="random")
    save_base(folder / "base", base)
    rules = (TargetRule(pattern=r"layers\.0\..*_proj", rank=3, alpha=6.0), TargetRule(pattern=r"layers\..*_proj"))
    cohort = Cohort.of(AdapterConfig(rank=2, targets=rules), model.sites())
    catalog = Catalog.open(folder / "catalog", create=True)
    stored = catalog.cohort(cohort.config, cohort.specs, base.digest, RowLayout.of(cohort.abstract()))
    adapters = [cohort.init(jax.random.key(seed)) for seed in (1, 2)]
    for adapter in adapters:
        catalog.commit(stored, "ada", adapter)
    return str(folder / "base"), str(folder / "catalog"), adapters


def test_out_of_one_catalog_into_another(world, tmp_path, capsys):
    base, catalog, adapters = world
    peft = str(tmp_path / "peft")
    report = str(tmp_path / "extract.json")
    assert main(["extract", catalog, "ada", peft, "--base_name", "a/base", "--json", report]) == 0
    assert sorted(os.listdir(peft)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads(Path(report).read_text())["provenance"]["revision"] == 2
    assert json.loads(Path(peft, "adapter_config.json").read_text())["base_model_name_or_path"] == "a/base"

    other = str(tmp_path / "other")
    assert main(["import", other, "bob", peft, "--base", base]) == 0
    adapter, manifest = Catalog.open(other).load("bob")
    assert manifest.base_digest == Catalog.open(catalog).history("ada")[0].base_digest
    expected = flatten_named(adapters[1])
    found = flatten_named(adapter)
    assert sorted(found) == sorted(expected)
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[name])
    assert "bob" in capsys.readouterr().out


def test_an_earlier_revision(world, tmp_path):
    _, catalog, _ = world
    report = tmp_path / "extract.json"
    peft = str(tmp_path / "peft")
    assert main(["extract", catalog, "ada", peft, "--revision", "1", "--json", str(report)]) == 0
    assert json.loads(report.read_text())["provenance"]["revision"] == 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["extract", "{catalog}", "eve", "{out}"], "eve"),
        (["extract", "{catalog}", "ada", "{out}", "--revision", "9"], "9"),
        (["extract", "{missing}", "ada", "{out}"], "missing"),
        (["import", "{out}", "bob", "{missing}", "--base", "{base}"], "missing"),
        (["import", "{out}", "bob", "{catalog}", "--base", "{missing}"], "missing"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(world, tmp_path, capsys, arguments, word):
    base, catalog, _ = world
    names = {"catalog": catalog, "base": base, "missing": tmp_path / "missing", "out": tmp_path / "out"}
    assert main([argument.format(**names) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert word in error
    assert os.listdir(tmp_path) == []


def test_an_existing_directory_is_not_overwritten_unasked(world, tmp_path, capsys):
    _, catalog, _ = world
    peft = str(tmp_path / "peft")
    assert main(["extract", catalog, "ada", peft]) == 0
    assert main(["extract", catalog, "ada", peft]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["extract", catalog, "ada", peft, "--overwrite"]) == 0


def test_extract_wakes_no_accelerator(world, tmp_path):
    """Without JAX_PLATFORMS in the environment, as a user's shell has it."""
    code = (
        "import sys; from popax.cli.main import main; code = main(sys.argv[1:]); "
        "from jax._src import xla_bridge; print(sorted(xla_bridge._backends)); sys.exit(code)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command = [sys.executable, "-c", code, "extract", world[1], "ada", str(tmp_path / "peft")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] in ("[]", "['cpu']")


def test_a_directory_of_nan_is_not_imported(world, tmp_path, capsys):
    base, catalog, _ = world
    peft, into = tmp_path / "peft", tmp_path / "into"
    assert main(["extract", catalog, "ada", str(peft)]) == 0
    tensors = safetensors.numpy.load_file(peft / "adapter_model.safetensors")
    first = sorted(tensors)[0]
    tensors[first] = np.full_like(tensors[first], np.nan)
    safetensors.numpy.save_file(tensors, peft / "adapter_model.safetensors")
    capsys.readouterr()
    assert main(["import", str(into), "bob", str(peft), "--base", base]) == 2
    assert "user 'bob': leaf 'layers." in capsys.readouterr().err
    assert not Catalog.open(into).exists("bob")
