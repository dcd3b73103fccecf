"""`popax report` makes tables of what `write_report` wrote."""

import pytest

from popax.bench.report import write_report
from popax.cli.main import main


@pytest.fixture
def report(tmp_path):
    rows = [{"user": f"u|{index}", "own": 1.0 + index} for index in range(3)]
    path = tmp_path / "demo.json"
    write_report(path, name="demo", config={}, figures={"users": 3, "gap": float("nan"), "ratio": 1.23456}, rows=rows)
    return path


def test_figures_and_rows_become_tables(report, capsys):
    assert main(["report", str(report), "--rows", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "### demo"
    assert "| ratio | 1.235 |" in lines
    assert "| gap |  |" in lines
    assert r"| u\|1 | 2 |" in lines
    assert lines[-1] == "The first 2 of 3 rows."


def test_output_goes_to_a_file(report, tmp_path, capsys):
    assert main(["report", str(report), str(report), "--output", str(tmp_path / "out.md")]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "out.md").read_text().count("### demo") == 2


def test_another_file_is_one_line_of_error(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{")
    assert main(["report", str(tmp_path / "other.json")]) == 2
    assert main(["report", str(tmp_path / "absent.json")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert "other.json" in first
    assert "absent.json" in second
