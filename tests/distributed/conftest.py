"""A tiny base and 24 users of different lengths, trained by real processes through launch/local.sh."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from popax.cli.main import main
from popax.training.metrics import read_metrics
from tests.compile_flags import COMPILE_QUICKLY

ROOT = Path(__file__).parents[2]
TINY_MODEL = Path(__file__).parents[1] / "tiny_model.gin"
TINY = """
PipelineConfig.seq_len = 24
PipelineConfig.batch_size = 4
PretrainConfig.steps = 3
PretrainConfig.warmup_steps = 1
"""
# A seat is long, so that a signal meets a run that has not ended; users outnumber the seats, so that they change.
USERS = r"""
PipelineConfig.seq_len = 24
PipelineConfig.batch_size = 2
PipelineConfig.validation_fraction = 0.2
AdapterConfig.rank = 2
AdapterConfig.targets = (r'layers\.attn\..*_proj',)
TrainConfig.slots = 8
TrainConfig.steps = 24
TrainConfig.learning_rate = 3e-3
TrainConfig.checkpoint_every = 4
EarlyStop.every = 2
EarlyStop.patience = 50
"""


class World:
    """Paths, and the commands over them. lost_after: seconds of silence that these tests wait for."""

    lost_after = 4

    def __init__(self, folder: Path):
        self.folder, self.base = folder, folder / "pretrained" / "base"
        (folder / "tiny.gin").write_text(TINY_MODEL.read_text() + TINY)
        (folder / "users.gin").write_text(USERS)
        words = random.Random(0)
        with (folder / "messages.jsonl").open("w") as lines:
            for user in range(24):
                word = "".join(words.choices("abcdefgh", k=5))
                for time_ in range(8 + user % 4):
                    lines.write(
                        f'{{"user": "u{user:02d}", "time": {time_}, "text": "{word} {word} {time_ % 3} {word}"}}\n'
                    )
        common = ["--data", str(folder / "messages.jsonl")]
        pretrain = ["--gin_file", str(folder / "tiny.gin"), "--out", str(folder / "pretrained"), "--tokenizer", "byte"]
        assert main(["pretrain", *common, *pretrain]) == 0
        self._train = [
            "train",
            *common,
            "--gin_file",
            str(folder / "users.gin"),
            "--base",
            str(self.base),
            "--no_table",
        ]

    def train(self, out: Path, *more: str) -> list[str]:
        return [*self._train, "--out", str(out), *more]

    @contextlib.contextmanager
    def launched(self, *command: str, processes: int = 2, devices: int = 4) -> Iterator[subprocess.Popen]:
        """launch/local.sh of the command; nothing that it started outlives the block."""
        arguments = ["--processes", str(processes), "--devices", str(devices), "--", *command]
        environment = os.environ | {
            "POPAX_PYTHON": sys.executable,
            "XLA_FLAGS": COMPILE_QUICKLY,
        }
        script = str(ROOT / "launch" / "local.sh")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen([script, *arguments], cwd=ROOT, env=environment, text=True, **pipes)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(60)

    def run(self, *command: str, processes: int = 2, devices: int = 4) -> str:
        """Its stdout, after it has ended well."""
        with self.launched(*command, processes=processes, devices=devices) as process:
            output, errors = process.communicate(timeout=150)
        assert process.returncode == 0, errors
        return output

    @staticmethod
    def wait_for_rounds(out: Path, rounds: int, process: subprocess.Popen) -> None:
        """Returns when the run in `out` has recorded so many rounds."""
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() or len(read_metrics(out)) < rounds:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "no rounds"
            time.sleep(0.02)

    def workers(self, process: subprocess.Popen) -> list[int]:
        """The processes that do the work, in their order: each the child of a supervisor that the script started."""
        return [child for supervisor in self.children(process.pid) for child in self.children(supervisor)]

    @staticmethod
    def children(pid: int) -> list[int]:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def straight(world) -> Path:
    """The run that everything else must equal: one process, one device, never stopped."""
    assert main(world.train(world.folder / "straight")) == 0
    return world.folder / "straight"
