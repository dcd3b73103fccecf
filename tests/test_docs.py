"""The numbers in the documentation are what the command prints from the committed reports."""

from pathlib import Path

from popax.cli.main import main

BENCHMARKS = Path(__file__).parents[1] / "docs" / "benchmarks"


def test_the_numbers_are_the_commands_output(tmp_path):
    reports = sorted(str(path) for path in BENCHMARKS.glob("*.json"))
    assert reports, "docs/benchmarks holds no report"
    output = tmp_path / "numbers.md"
    assert main(["report", *reports, "--rows", "0", "--output", str(output)]) == 0
    assert output.read_text() == (BENCHMARKS / "numbers.md").read_text()


def test_the_table_of_kernels_is_the_commands_output(tmp_path):
    output = tmp_path / "kernels.md"
    assert main(["report", str(BENCHMARKS / "kernels_tpu.json"), "--rows", "60", "--output", str(output)]) == 0
    assert output.read_text() == (BENCHMARKS / "kernels_tpu.md").read_text()
