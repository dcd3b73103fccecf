"""`popax train` as a nightly job: again with more data, with bad records in them, with a run that was stopped."""

import json
import signal
from pathlib import Path

import pytest

from popax.cli.main import main
from popax.store.catalog import Catalog
from popax.training.metrics import MetricsWriter, read_metrics


class Job:
    """A job into one directory, over a file that a test appends to."""

    def __init__(self, world, folder: Path):
        self._world, self.out, self.data, self.report = (
            world,
            folder / "run",
            folder / "m.jsonl",
            folder / "report.json",
        )
        self.data.write_text(Path(world.data).read_text())

    def night(self, *more: str) -> int:
        arguments = self._world.train(self.out, "--no_table", "--json", str(self.report), *more)
        arguments[arguments.index(self._world.data)] = str(self.data)
        return main(arguments)

    def append(self, *records: object) -> None:
        with self.data.open("a") as lines:
            lines.writelines((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records)

    @property
    def parents(self) -> dict[str, list[int | None]]:
        catalog = Catalog.open(str(self.out / "catalog"), read_only=True)
        return {record.user: [one.parent for one in catalog.history(record.user)] for record in catalog.list()}

    @property
    def figures(self) -> dict:
        return json.loads(self.report.read_text())["figures"]


@pytest.fixture
def job(world, tmp_path) -> Job:
    return Job(world, tmp_path)


@pytest.fixture
def stopping(monkeypatch):
    """Ctrl-C after the first round, while open."""
    write = MetricsWriter.write

    def interrupt(self, step, values):
        write(self, step, values)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", interrupt)
        yield patch


def test_each_night_trains_who_has_written_and_a_bad_record_is_its_users_own(job, capsys):
    assert job.night() == 0
    assert job.figures["users_trained"] == 5
    job.append(
        {"user": "u01", "time": 10, "text": "tonight tonight"},
        *({"user": "new", "time": time, "text": "hello hello"} for time in range(8)),
        {"user": "u02", "time": 10, "text": 7},
        {"user": "u03", "time": 11, "messages": "no list"},
    )
    assert job.night() == 3
    out = capsys.readouterr()
    assert "2 users trained" in out.out
    assert "2 set aside" in out.out
    number = len(job.data.read_text().splitlines())
    assert f"set aside: u02: {job.data}:{number - 1}: text is a int, not a string" in out.err
    (told,) = json.loads(job.report.read_text())["config"]["rounds"]
    assert [(one["user"], one["record"], one["file"]) for one in told["set_aside"]] == [
        ("u02", number - 1, str(job.data)),
        ("u03", number, str(job.data)),
    ]
    assert (told["round"], job.figures["users_set_aside"], job.figures["users_trained"]) == (2, 2, 2)
    assert job.parents == {"new": [None], "u00": [None], "u01": [None, 1], "u02": [None], "u03": [None], "u04": [None]}
    steps = [record["step"] for record in read_metrics(job.out)]
    assert steps == sorted(set(steps)), "the second night's rounds follow the first's"
    assert job.night() == 3, "who is set aside stays so until something changes"
    assert "0 users trained in 0 iterations" in capsys.readouterr().out
    assert job.parents["u01"] == [None, 1]


def test_a_record_that_can_be_nobodys_refuses_the_file_and_keeps_the_data(job, capsys):
    assert job.night() == 0
    job.append("{not json")
    assert job.night() == 2
    assert f"{job.data}:{len(job.data.read_text().splitlines())}" in capsys.readouterr().err
    assert (job.out / "data" / "users").is_dir()


def test_a_stopped_night_keeps_its_data_until_it_is_closed(job, capsys, stopping):
    assert job.night() == 130
    job.append({"user": "u00", "time": 10, "text": "more more"})
    capsys.readouterr()
    assert job.night() == 2
    error = capsys.readouterr().err
    assert "--close_stopped" in error
    assert f"--data {job.out / 'data'}" in error
    stopping.undo()
    assert job.night("--data", str(job.out / "data")) == 0, "what it was begun with is still there"
    assert set(job.parents) == {"u00", "u01", "u02", "u03", "u04"}
    assert job.night() == 0
    assert job.parents["u00"] == [None, 1]
    assert job.parents["u01"] == [None]


def test_closing_a_stopped_night_begins_a_new_one(job, capsys, stopping):
    assert job.night() == 130
    stopping.undo()
    job.append({"user": "u00", "time": 10, "text": "more more"})
    assert job.night("--close_stopped") == 0
    error = capsys.readouterr().err
    assert "closed run " in error
    assert "u00@none" in error
    assert job.parents == {user: [None] for user in ("u00", "u01", "u02", "u03", "u04")}
    assert job.figures["users_trained"] == 5


def test_the_table_is_made_once_for_each_round(job, capsys):
    assert job.night() == 0
    again = job._world.train(job.out)
    again[again.index(job._world.data)] = str(job.data)
    capsys.readouterr()
    assert main(again) == 0
    assert "of 5 users, the own adapter beats" in capsys.readouterr().out
    assert main(again) == 0
    assert "the own adapter beats" not in capsys.readouterr().out
