"""`popax bench compression` on a trained population: what it says is what the forms are."""

import json

import pytest

from popax.bench.compression import BenchCompressionConfig
from popax.cli.main import main
from popax.errors import CatalogError, ConfigError
from popax.store.catalog import Catalog


def test_forms_are_scored_and_the_catalog_stays_as_it_is(world, tmp_path, capsys):
    before = [record.to_dict() for record in Catalog.open(world.catalog, read_only=True).list()]
    out = tmp_path / "compression.json"
    # A basis as wide as the model holds everything: nothing may change.
    params = [
        "--gin_param",
        "BenchCompressionConfig.ranks = (1, 256)",
        "--gin_param",
        "BenchCompressionConfig.clusters = (1,)",
    ]
    command = ["bench", "compression", "--gin_file", str(world.run / "operative.gin"), "--base", world.base]
    command += ["--catalog", world.catalog, "--data", str(world.run / "data"), "--json", str(out), *params]
    assert main(command) == 0
    report = json.loads(out.read_text())
    rows = {(row["form"], row["rank"]): row for row in report["rows"]}
    assert list(rows) == [
        ("int8", None), ("int4", None), ("basis", 1), ("basis-int8", 1), ("basis", 256), ("basis-int8", 256)
    ]  # fmt: skip
    assert report["figures"]["users"] == 5
    assert rows["int4", None]["update_error"] > rows["int8", None]["update_error"] > 0
    whole = rows["basis", 256]
    assert max(whole["update_error"], whole["update_error_unseen"], abs(whole["loss"])) < 1e-5
    assert whole["gain_kept"] == pytest.approx(1, abs=1e-3)
    assert rows["basis", 1]["bytes_a_user"] < whole["bytes_a_user"]
    assert rows["basis", 1]["update_error"] > 0.01
    assert [record.to_dict() for record in Catalog.open(world.catalog, read_only=True).list()] == before
    assert "gain_kept" in capsys.readouterr().out


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match=r"ranks=\(0,\)"):
        BenchCompressionConfig(ranks=(0,))
    with pytest.raises(CatalogError, match="'int3'"):
        BenchCompressionConfig(inners=("int3",))
