"""The whole road once for all tests of these commands: users' text, a tiny base, a trained population."""

import json
import random
from pathlib import Path
from typing import NamedTuple

import pytest

from popax.cli.main import main

TINY_MODEL = Path(__file__).parents[1] / "tiny_model.gin"
TINY = """
PipelineConfig.seq_len = 24
PipelineConfig.batch_size = 4
PipelineConfig.past_fraction = 0.9
PipelineConfig.validation_fraction = 0.0
PretrainConfig.steps = 12
PretrainConfig.warmup_steps = 2
PretrainConfig.learning_rate = 1e-2
PretrainConfig.checkpoint_every = 4
"""
USERS = r"""
PipelineConfig.seq_len = 24
PipelineConfig.batch_size = 2
PipelineConfig.validation_fraction = 0.2
AdapterConfig.rank = 2
AdapterConfig.targets = (r'layers\.attn\..*_proj',)
TrainConfig.slots = 3
TrainConfig.steps = 6
TrainConfig.learning_rate = 3e-2
TrainConfig.checkpoint_every = 3
EarlyStop.every = 3
EvalConfig.group = 4
EvalConfig.rows = 2
"""


class World(NamedTuple):
    """Paths: the messages, both gin files, a base, a finished run of users with at least 8 messages, its report."""

    data: str
    tiny: str
    users: str
    base: str
    run: Path
    report: Path

    @property
    def catalog(self) -> str:
        return str(self.run / "catalog")

    def train(self, out: Path, *more: str) -> list[str]:
        """The arguments of a `popax train` into `out`."""
        arguments = ["train", "--gin_file", self.users, "--base", self.base, "--data", self.data, "--out", str(out)]
        return [*arguments, "--users_with_at_least", "8", *more]

    def pretrain(self, out: Path, *more: str) -> list[str]:
        """The arguments of a `popax pretrain` into `out`, with the byte tokenizer where `more` names no other."""
        return ["pretrain", "--gin_file", self.tiny, "--data", self.data, "--out", str(out), *more]


def write_messages(path: Path) -> None:
    """Five users of 10 messages who repeat words of their own, and twenty who wrote three."""
    random_words = random.Random(0)
    with path.open("w") as lines:
        for number in range(25):
            words = ["".join(random_words.choices("abcdefgh", k=4)) for _ in range(2)]
            for time in range(10 if number < 5 else 3):
                record = {"user": f"u{number:02d}", "time": time, "text": " ".join(words * 3)}
                lines.write(json.dumps(record) + "\n")


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("road")
    (folder / "tiny.gin").write_text(TINY_MODEL.read_text() + TINY)
    (folder / "users.gin").write_text(USERS)
    write_messages(folder / "messages.jsonl")
    made = World(
        data=str(folder / "messages.jsonl"),
        tiny=str(folder / "tiny.gin"),
        users=str(folder / "users.gin"),
        base=str(folder / "pretrained" / "base"),
        run=folder / "run",
        report=folder / "train.json",
    )
    tokenizer = ["--tokenizer", "bpe:300", "--users_below", "8"]
    assert main(made.pretrain(folder / "pretrained", *tokenizer, "--json", str(folder / "pretrain.json"))) == 0
    assert main(made.train(made.run, "--json", str(made.report))) == 0
    return made
