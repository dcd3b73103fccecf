"""The demo in small, through its command: everything it promises is written, and the base is kept for the next time."""

import json

import numpy as np
import pytest

from popax.cli.main import main
from popax.demo.corpus import as_dataset, corpus_digest, demo_corpus
from popax.demo.run import cache_directory, next_directory
from popax.errors import DataError

SMALL = {
    "users": 3,
    "vocab_size": 300,
    "embed_dim": 32,
    "num_layers": 1,
    "base_steps": 10,
    "base_batch_size": 2,
    "base_seq_len": 32,
    "max_user_bytes": 24_000,
    "steps": 4,
    "validate_every": 2,
    "batch_size": 1,
    "seq_len": 32,
    "held_out_rows": 2,
    "generate_users": 2,
    "new_tokens": 4,
}


@pytest.mark.slow
def test_the_demo_writes_all_it_promises_and_finds_its_base_again(tmp_path, capsys):
    options = [part for key, value in SMALL.items() for part in ("--gin_param", f"DemoConfig.{key}={value}")]
    command = ["demo", "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache"), *options]
    assert main([*command, "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    figures = report["figures"]
    assert figures["users"] == len(report["rows"]) == 3
    assert not figures["base_cached"]
    assert {"own_beats_base", "own_beats_wrong", "own_beats_shared", "seconds"} <= set(figures)
    for row in report["rows"]:
        assert all(np.isfinite(row[column]) for column in ("base", "shared", "own", "wrong"))
    run = tmp_path / "run"
    assert {"catalog", "gains.png", "demo.json", "operative.gin", "metrics.jsonl"} <= {p.name for p in run.iterdir()}
    (peft,) = run.glob("peft-*")
    assert {p.name for p in peft.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    printed = capsys.readouterr().out
    assert "own" in printed
    assert printed.count("continues") == 3, "the base and two users, in one batch"
    # A second time: another directory, the same base, the same result.
    assert main([*command, "--json", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["figures"]["base_cached"]
    assert again["rows"] == report["rows"]
    assert (tmp_path / "run-2" / "demo.json").exists()


def test_users_and_base_share_no_text():
    corpus = demo_corpus(64, 150_000)
    assert len(corpus.users) == 64
    assert not set(corpus.users) & set(corpus.base)
    dataset = as_dataset(corpus.users)
    assert all(dataset.num_examples(user) >= 3 for user in dataset.users())
    assert corpus_digest(corpus.base) == corpus_digest(dict(reversed(corpus.base.items())))
    with pytest.raises(DataError, match="not 5000"):
        demo_corpus(5000, 150_000)


def test_an_unfinished_demo_goes_on_and_a_finished_one_is_left_alone(tmp_path, monkeypatch):
    wanted = tmp_path / "demo"
    wanted.mkdir()
    assert next_directory(wanted, "demo.json") == wanted
    (wanted / "demo.json").touch()
    assert next_directory(wanted, "demo.json") == tmp_path / "demo-2"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "popax"
