"""`make accept-ROOM` on a room of tests that are made for it."""

import json
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.acceptance import __main__ as acceptance

CELLS = """
from tests.sizes import size

def test_whole(): assert size(1, whole_size=2) == 2
def test_broken(): assert {broken}
"""


class Room(NamedTuple):
    run: Callable[[], int]
    write: Callable[[bool], None]
    git: Callable[..., None]
    out: Path

    def cells(self) -> dict[str, dict]:
        return json.loads((self.out / "mine.json").read_text())["cells"]


@pytest.fixture
def room(tmp_path, monkeypatch):
    """In a checkout of its own."""
    repository = tmp_path / "checkout"
    (repository / "tests").mkdir(parents=True)
    (repository / "tests" / "sizes.py").write_text((acceptance.ROOT / "tests" / "sizes.py").read_text())
    (tmp_path / "rooms.toml").write_text('[mine]\ntests = ["test_cells.py"]\n')
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take most of the time
    monkeypatch.setattr(acceptance, "ROOT", repository)
    monkeypatch.setattr(acceptance, "ROOMS", tmp_path / "rooms.toml")

    def write(broken):
        (repository / "test_cells.py").write_text(CELLS.format(broken=broken))

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *arguments], cwd=repository, check=True, capture_output=True)

    write(False)
    git("init")
    git("add", "-A")
    git("commit", "-m", "one")
    return Room(lambda: acceptance.main(["mine", "--out", str(repository / "out")]), write, git, repository / "out")


def test_a_room_is_whole_and_goes_on_with_what_has_not_passed(room, capsys):
    assert room.run() == 1
    assert {cell: found["outcome"] for cell, found in room.cells().items()} == {
        "test_cells.py::test_whole": "passed",
        "test_cells.py::test_broken": "failed",
    }
    # The report itself is tracked, and changes while the command runs.
    room.git("add", "-A")
    room.git("commit", "-m", "the report")
    capsys.readouterr()
    assert room.run() == 1
    said = capsys.readouterr().out
    assert "1 of 2: test_cells.py::test_whole" in said  # another commit: everything anew
    assert room.run() == 1
    assert "1 of 1: test_cells.py::test_broken" in capsys.readouterr().out


def test_of_a_tree_with_changes_nothing_counts_as_passed(room, capsys):
    room.write(True)
    assert room.run() == 0
    assert all(found["commit"].endswith("+changed") for found in room.cells().values())
    capsys.readouterr()
    room.run()
    assert "1 of 2" in capsys.readouterr().out


def test_every_room_names_tests_that_are_there_and_make_opens_it():
    rooms = tomllib.loads(acceptance.ROOMS.read_text())
    makefile = (acceptance.ROOT / "Makefile").read_text()
    for room, entry in rooms.items():
        assert f"accept-{room}" in makefile
        for test in entry["tests"]:
            file, _, name = test.partition("::")
            assert (
                f"def {name}(" in (acceptance.ROOT / file).read_text() if name else (acceptance.ROOT / file).is_file()
            )
