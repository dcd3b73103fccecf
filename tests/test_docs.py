"""The numbers in the documentation are what the command prints from the committed reports."""

from pathlib import Path

import pytest

from popax.cli.main import main

BENCHMARKS = Path(__file__).parents[1] / "docs" / "benchmarks"


def test_the_numbers_are_the_commands_output(tmp_path):
    reports = sorted(str(path) for path in BENCHMARKS.glob("*.json"))
    assert reports, "docs/benchmarks holds no report"
    output = tmp_path / "numbers.md"
    assert main(["report", *reports, "--rows", "0", "--output", str(output)]) == 0
    assert output.read_text() == (BENCHMARKS / "numbers.md").read_text()


@pytest.mark.parametrize("name", ["kernels_slots", "kernels_tpu_v5e", "kernels_grouped_v5e", "kernels_ce_v5e"])
def test_the_tables_of_kernels_are_the_commands_output(tmp_path, name):
    output = tmp_path / "kernels.md"
    assert main(["report", str(BENCHMARKS / f"{name}.json"), "--rows", "600", "--output", str(output)]) == 0
    assert output.read_text() == (BENCHMARKS / f"{name}.md").read_text()
