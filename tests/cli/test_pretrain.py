"""`popax pretrain`: a base with its tokenizer; stopped and continued; what is refused, and how."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from popax.cli.main import main
from popax.data.tokenize import load_tokenizer
from popax.modeling.base import load_base
from popax.training.metrics import MetricsWriter, read_metrics


def test_the_base_carries_its_tokenizer(world):
    base, tokenizer = load_base(world.base), load_tokenizer(world.base)
    assert base.model.config.vocab_size == 300
    assert 259 < tokenizer.vocab_size <= 300
    report = json.loads((Path(world.base).parents[1] / "pretrain.json").read_text())
    assert report["figures"]["steps"] == 12
    assert report["figures"]["users"] == 20  # those with fewer than 8 messages
    assert 0 < report["figures"]["held_out_bits_per_byte"] < 9
    run = Path(world.base).parent
    assert "PretrainConfig.steps = 12" in (run / "operative.gin").read_text()
    assert [record["step"] for record in read_metrics(run)] == list(range(1, 13))


def test_stopped_by_ctrl_c_and_continued_it_is_the_same_base(world, tmp_path, capsys, monkeypatch):
    write = MetricsWriter.write

    def interrupt_at_step_5(self, step, values):
        write(self, step, values)
        if step == 5:
            signal.raise_signal(signal.SIGINT)

    command = world.pretrain(tmp_path, "--tokenizer", "bpe:300", "--users_below", "8")
    monkeypatch.setattr(MetricsWriter, "write", interrupt_at_step_5)
    assert main(command) == 130
    assert "step 6 of 12 is checkpointed" in capsys.readouterr().err
    assert not (tmp_path / "base").exists()
    monkeypatch.setattr(MetricsWriter, "write", write)
    assert main(command) == 0
    assert load_base(tmp_path / "base").digest == load_base(world.base).digest
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 13))
    assert main(command) == 0  # done already: nothing changes


def test_a_real_ctrl_c_ends_the_process_with_130(world, tmp_path):
    command = [sys.executable, "-m", "popax.cli", *world.pretrain(tmp_path, "--gin_param", "PretrainConfig.steps=9999")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ)
    metrics, waited = tmp_path / "metrics.jsonl", 0.0
    while not (metrics.exists() and metrics.stat().st_size) and waited < 120 and process.poll() is None:
        time.sleep(0.2)
        waited += 0.2
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "interrupted: step" in error
    assert "Traceback" not in error
    assert "WARNING" not in error


def test_the_byte_tokenizer_is_the_default(world, tmp_path):
    assert main(world.pretrain(tmp_path, "--gin_param", "PretrainConfig.steps=3")) == 0
    np.testing.assert_array_equal(load_tokenizer(tmp_path / "base").encode("ab").ids, [97, 98])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--gin_param", "ModelConfig.vocab_size=100"], "the tokenizer has 259 tokens"),
        (["--gin_param", "PipelineConfig.seq_len=100"], "max_seq_len=64"),
        (["--gin_param", "PretrainConfig.steps=0"], "0 <= warmup_steps < steps"),
        (["--tokenizer", "bpe:many"], "bpe:SIZE"),
        (["--tokenizer", "bpe:100"], "vocab_size=100: at least 259"),
        (["--tokenizer", "nowhere"], "no tokenizer at nowhere"),
        (["--users_below", "1"], "none of the 25 users"),
        (["--data", "nowhere.jsonl"], "no data at nowhere.jsonl"),
    ],
)
def test_what_is_wrong_is_one_line(world, tmp_path, capsys, more, words):
    assert main(world.pretrain(tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "base").exists()


def test_a_key_without_value_is_named(world, tmp_path, capsys):
    lines = Path(world.tiny).read_text().splitlines()
    (tmp_path / "less.gin").write_text("\n".join(line for line in lines if "embed_dim" not in line))
    arguments = world.pretrain(tmp_path / "run")
    arguments[arguments.index(world.tiny)] = str(tmp_path / "less.gin")
    assert main(arguments) == 2
    assert "ModelConfig.embed_dim has no value" in capsys.readouterr().err


def test_a_run_recorded_without_its_schedule_is_gone_on_from_only_where_it_is_finished(world, tmp_path, capsys):
    """As commit 5570f37 wrote run.json: a base that is made stays what it is, a run that stopped had other rates."""
    command = world.pretrain(tmp_path, "--gin_param", "PretrainConfig.steps=3")
    assert main(command) == 0
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["settings"].pop("schedule")["name"] == "warmup_cosine_factor"
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert main(command) == 0
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert main(command) == 2
    assert "that an older popax stopped" in capsys.readouterr().err
