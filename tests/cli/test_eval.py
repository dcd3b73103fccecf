"""`popax eval`: the table of a finished run, again and from the catalog alone."""

import json

import pytest

from popax.cli.main import main


def arguments(world, *more, catalog=None, data=None):
    gin = str(world.run / "operative.gin")
    where = ["--catalog", str(catalog or world.catalog), "--data", str(data or world.run / "data")]
    return ["eval", "--gin_file", gin, "--base", world.base, *where, *more]


@pytest.mark.parametrize("raw", [False, True])
def test_it_gives_the_runs_own_numbers(world, tmp_path, raw, capsys):
    path = tmp_path / "eval.json"
    data = world.data if raw else None
    assert main(arguments(world, "--shared", str(world.run / "shared"), "--json", str(path), data=data)) == 0
    again, before = json.loads(path.read_text()), json.loads(world.report.read_text())
    assert again["rows"] == before["rows"]
    assert again["figures"]["own_beats_wrong"] == before["figures"]["own_beats_wrong"]
    shown = capsys.readouterr().out
    assert "bits per byte" in shown
    assert "of 5 users" in shown


def test_without_a_shared_adapter_its_column_is_empty(world, tmp_path, capsys):
    path = tmp_path / "eval.json"
    assert main(arguments(world, "--user", "u01", "--user", "u03", "--json", str(path))) == 0
    report = json.loads(path.read_text())
    assert [row["user"] for row in report["rows"]] == ["u01", "u03"]
    assert all(row["shared"] is None for row in report["rows"])
    assert report["figures"]["own_beats_shared"] is None


def test_what_is_wrong_is_one_line(world, tmp_path, capsys):
    def refused(*more, **places):
        assert main(arguments(world, *more, **places)) == 2
        error = capsys.readouterr().err.splitlines()
        return error[-1]

    assert "'zed'" in refused("--user", "zed", "--user", "u00")
    assert "at least two" in refused("--user", "u00")
    assert "nowhere" in refused(catalog="nowhere")
    assert "no base to load" in refused("--base", str(tmp_path))
    assert main(world.pretrain(tmp_path / "other", "--gin_param", "PretrainConfig.steps=3")) == 0
    capsys.readouterr()
    assert "was made for the base" in refused("--base", str(tmp_path / "other" / "base"))
