"""What earlier versions wrote opens: catalogs, run directories, gin files; or the command that goes on is named."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from popax.cli.main import main
from popax.store.catalog import Catalog

ARCHIVES = sorted((Path(__file__).parent / "data" / "older").glob("*.tar.gz"))
assert ARCHIVES, "tests/data/older holds no archive"


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name.partition(".")[0])
def older(request, tmp_path, monkeypatch) -> Path:
    """A folder as an older version left it; it is the working directory."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(out: str, *more: str) -> list[str]:
    given = ["--gin_file", "users.gin", "--base", "pretrained/base", "--data", "messages.jsonl", "--out", out]
    return ["train", *given, "--no_table", *more]


def parents(out: str) -> dict[str, list[int | None]]:
    catalog = Catalog.open(f"{out}/catalog", read_only=True)
    return {record.user: [one.parent for one in catalog.history(record.user)] for record in catalog.list()}


def test_a_catalog_opens_and_every_revision_is_right(older):
    catalog = Catalog.open("run/catalog", read_only=True)
    assert [record.user for record in catalog.list()] == ["u0", "u1", "u2", "u3"]
    for user in ("u0", "u3"):
        adapter, manifest = catalog.load(user)
        assert manifest.provenance["data"]["examples"] == 8
        assert all(np.isfinite(leaf).all() for site in adapter.values() for leaf in site.values())
    assert catalog.verify().problem_count == 0
    assert (
        main(
            [
                "generate",
                "--base",
                "pretrained/base",
                "--catalog",
                "run/catalog",
                "--user",
                "u1",
                "--prompt",
                "ab",
                "--max_new_tokens",
                "2",
                "--revision",
                "latest",
            ]
        )
        == 0
    )


def test_a_finished_run_is_up_to_date_and_then_trains_who_has_news(older, capsys):
    assert main(train("run")) == 0
    assert "0 users trained in 0 iterations, 4 up to date" in capsys.readouterr().out
    assert parents("run") == {user: [None] for user in ("u0", "u1", "u2", "u3")}
    with (older / "messages.jsonl").open("a") as lines:
        lines.write(json.dumps({"user": "u2", "time": 9, "text": "a new message of mine"}) + "\n")
    assert main(train("run")) == 0
    assert "1 users trained" in capsys.readouterr().out
    assert parents("run") == {"u0": [None], "u1": [None], "u2": [None, 1], "u3": [None]}


def test_a_run_with_other_settings_is_still_another_run(older, capsys):
    assert main(train("run", "--gin_param", "TrainConfig.seed=5")) == 2
    assert "other settings (seed)" in capsys.readouterr().err


def test_a_stopped_run_names_the_flag_that_closes_it(older, capsys):
    assert main(train("stopped")) == 2
    assert "--close_stopped" in capsys.readouterr().err
    assert main(train("stopped", "--close_stopped")) == 0
    assert parents("stopped") == {user: [None] for user in ("u0", "u1", "u2", "u3")}


def test_a_base_that_was_pretrained_is_used_again(older):
    def files():
        return {path: path.read_bytes() for path in (older / "pretrained" / "base").rglob("*") if path.is_file()}

    made = files()
    command = ["pretrain", "--gin_file", "tiny.gin", "--data", "messages.jsonl", "--tokenizer", "byte"]
    assert main([*command, "--out", "pretrained"]) == 0
    assert files() == made
