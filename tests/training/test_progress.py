"""Progress is a bar on a terminal and a few lines in a log."""

import io

from popax.training.progress import Progress, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_one_last_line():
    log = io.StringIO()
    with Progress("train", total=1000, stream=log) as bar:
        for _ in range(1000):
            bar.update(note="loss 2.0")
    assert log.getvalue().count("\n") == 1
    assert log.getvalue().startswith("train: 1000/1000 steps, ")
    assert log.getvalue().endswith("loss 2.0\n")


def test_a_log_gets_a_line_every_interval():
    log = io.StringIO()
    with Progress("train", stream=log, interval=0.0) as bar:
        bar.update()
        bar.update(2)
    assert [line.split(",")[0] for line in log.getvalue().splitlines()] == [
        "train: 1 steps",
        "train: 3 steps",
        "train: 3 steps",
    ]


def test_a_terminal_gets_a_bar():
    terminal = Terminal()
    with Progress("train", total=2, start=1, stream=terminal) as bar:
        bar.update(note="loss 2.0")
    assert "2/2" in terminal.getvalue()
    assert "\r" in terminal.getvalue()


def test_items_pass_through(capsys):
    assert list(progress(["a", "b"], "read", unit="file")) == ["a", "b"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("read: 2/2 files")


def test_nothing_done_says_nothing():
    log = io.StringIO()
    Progress("train", stream=log).close()
    assert log.getvalue() == ""
