"""`popax eval`: the table of a finished run, again and from the catalog alone."""

import json
import shutil

import pytest

from popax.cli.main import main
from popax.store import Catalog


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


def test_scores_are_recorded_and_the_gate_decides(world, tmp_path, capsys):
    """The four-column table's own numbers, kept beside the revisions; serving follows those that pass."""
    catalog, path = tmp_path / "catalog", tmp_path / "scores.json"
    shutil.copytree(world.catalog, catalog)
    table = {row["user"]: row for row in json.loads(world.report.read_text())["rows"]}
    retention = ["--retention", world.data, "--retention_rows", "8"]
    assert main(arguments(world, "--record", *retention, "--json", str(path), catalog=catalog)) == 0
    assert "u00@1: scored" in capsys.readouterr().out
    opened = Catalog.open(catalog)
    manifests = [opened.load(user)[1] for user in table]
    for manifest, scores in zip(manifests, opened.scores(manifests), strict=True):
        assert scores.own == pytest.approx(table[manifest.user]["own"], rel=1e-6)
        assert scores.base == pytest.approx(table[manifest.user]["base"], rel=1e-6)
        assert scores.digest == manifest.digest
        assert scores.data == manifest.provenance["data"]
        assert scores.retention_data["rows"] == 8
        assert scores.retention_loss is not None
        assert 0 < scores.norm < 5
    assert opened.list(status="promoted") == []
    best = max(scores.gain for scores in opened.scores(manifests))
    gate = ["--gin_param", f"GateConfig.min_gain={best - 1e-9}", "--gin_param", "GateConfig.max_norm=9.0"]
    gate += ["--gin_param", "GateConfig.max_retention_loss=99.0", "--gin_param", "GateConfig.min_bytes=1"]
    assert main(arguments(world, "--promote", *retention, *gate, "--json", str(path), catalog=catalog)) == 0
    report = json.loads(path.read_text())
    assert (report["figures"]["scored"], report["figures"]["promoted"]) == (len(table), 1)
    [served] = [record.user for record in Catalog.open(catalog).list(status="promoted")]
    assert [row["user"] for row in report["rows"] if row["passed"]] == [served]
    assert "candidate (gain" in capsys.readouterr().out
    other = next(user for user in table if user != served)
    assert main(["users", "promote", str(catalog), other, *gate]) == 2
    assert "stays a candidate" in capsys.readouterr().err
    assert main(["users", "promote", str(catalog), served, *gate]) == 0


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


@pytest.mark.slow
def test_users_are_carried_over_to_a_new_base(world, tmp_path, capsys):
    catalog, path = tmp_path / "catalog", tmp_path / "migrate.json"
    shutil.copytree(world.catalog, catalog)
    assert main(world.pretrain(tmp_path / "new", "--gin_param", "PretrainConfig.steps=14")) == 0
    gin, new = str(world.run / "operative.gin"), str(tmp_path / "new" / "base")
    command = ["migrate", "--gin_file", gin, "--base", world.base, "--to", new, "--catalog", str(catalog)]
    command += ["--data", str(world.run / "data"), "--json", str(path)]
    assert main(command) == 0
    report = json.loads(path.read_text())
    assert report["figures"]["users"] == len(report["rows"]) == 5
    assert "bits per byte" in capsys.readouterr().out
    for base, user in ((new, "u00@latest"), (world.base, "u00@1")):
        asked = ["--catalog", str(catalog), "--prompt", "a", "--max_new_tokens", "4", "--user", user]
        assert main(["generate", "--base", base, *asked]) == 0
    assert main(command) == 0
    assert "0 users migrated, 5 were there already" in capsys.readouterr().out
