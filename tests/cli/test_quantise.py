"""--quantise: whose adapters a rounded base takes, and what the benchmark writes about it."""

import json

import pytest

from popax.cli.main import main


def generate(world, path, *more):
    arguments = ["generate", "--base", world.base, "--catalog", world.catalog, "--prompt", "ab", "--user", "u00@latest"]
    code = main([*arguments, "--max_new_tokens", "4", "--json", str(path), *more])
    return json.loads(path.read_text()) if code == 0 else code


def test_an_adapter_of_the_stored_base_is_refused_unless_it_is_asked_for(world, tmp_path, capsys):
    assert generate(world, tmp_path / "a.json", "--quantise", "int8") == 2
    assert "was made for the base" in capsys.readouterr().err
    (row,) = generate(world, tmp_path / "b.json", "--quantise", "int8", "--unquantised_adapters")
    assert row["name"] == "u00@1"
    assert generate(world, tmp_path / "c.json", "--unquantised_adapters") == 2
    assert "--quantise" in capsys.readouterr().err
    assert generate(world, tmp_path / "d.json", "--quantise", "int3") == 2
    assert "int3" in capsys.readouterr().err


@pytest.mark.slow
def test_the_benchmark_compares_bases_in_fewer_bits(world, tmp_path, capsys):
    report = tmp_path / "quantised.json"
    arguments = ["bench", "quantised", "--gin_file", world.users, "--base", world.base, "--data", world.data]
    bindings = ["BenchQuantisedConfig.schemes=('int8',)", "BenchQuantisedConfig.users=2", "TrainConfig.slots=2"]
    params = [part for binding in bindings for part in ("--gin_param", binding)]
    assert main([*arguments, *params, "--json", str(report)]) == 0
    full, int8 = json.loads(report.read_text())["rows"]
    assert (full["weights"], int8["weights"]) == ("bfloat16", "int8")
    assert int8["bytes"] < full["bytes"]
    assert 0 < full["max_logit_error"] < 10
    assert 0 <= int8["kl_nats"] < 0.1
    assert int8["top1_agreement"] > 0.8
    assert int8["gain"] == pytest.approx(full["gain"], abs=0.5)
    assert int8["full_bases_adapters"] == pytest.approx(full["own"], abs=0.1)
    assert "gain_int8" in capsys.readouterr().out


def test_the_benchmark_says_what_it_needs(capsys):
    for arguments in ([], ["--base", "x"], ["--demo", "--base", "x", "--data", "y"]):
        assert main(["bench", "quantised", *arguments]) == 2
        assert "--demo" in capsys.readouterr().err
