"""Launchers are run as a person runs them: by their path, with a PATH that holds the test's own programs."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
TRAIN = [
    "--",
    "train",
    "--gin_file",
    "configs/runs/irc_ubuntu_users.gin",
    "--base",
    "/bucket/base",
    "--data",
    "/bucket/messages.jsonl.gz",
    "--out",
    "/bucket/runs/irc",
    "--no_table",
]
OWN_TOOLS = ("bash", "basename", "cat", "cp", "dirname", "env", "git", "head", "seq", "sleep", "tail")


class Shell:
    """A directory of programs, and nothing else, as PATH. Every fake appends its words to `calls`."""

    def __init__(self, folder: Path):
        self.folder, self.programs = folder, folder / "bin"
        self.programs.mkdir()
        for name in OWN_TOOLS:
            found = shutil.which(name)
            assert found is not None, name
            (self.programs / name).symlink_to(found)

    def add(self, name: str, body: str) -> None:
        program = self.programs / name
        program.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "{name} $*" >> "{self.folder}/calls"\n{body}\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    def run(self, script: str, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.programs), "TMPDIR": str(self.folder), "HOME": os.environ.get("HOME", "/")}
        return subprocess.run(
            [str(LAUNCH / script), *words],
            env=environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def shell(tmp_path) -> Shell:
    return Shell(tmp_path)
