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


KERNELS = ("kernels_slots", "kernels_tpu_v5e", "kernels_grouped_v5e", "kernels_ce_v5e", "kernels_grouped_matmul_h200")
LOADING = ("load_8b", "load_warm", "load_together")


@pytest.mark.parametrize("name", [*KERNELS, *LOADING, "quantised_tinystories", "quantised_demo", "train_methods"])
def test_the_tables_with_rows_are_the_commands_output(tmp_path, name):
    output = tmp_path / "kernels.md"
    assert main(["report", str(BENCHMARKS / f"{name}.json"), "--rows", "600", "--output", str(output)]) == 0
    assert output.read_text() == (BENCHMARKS / f"{name}.md").read_text()


def test_the_plans_are_the_commands_output(tmp_path):
    """Every committed plan has its gin file, and the pages show what the command prints of all of them."""
    folder = BENCHMARKS.parent / "plans"
    for place, page in ((folder, "plans.md"), (folder / "replicas", "replicas.md")):
        plans = sorted(place.glob("*.json"))
        assert plans, f"{place} holds no report"
        for plan in plans:
            assert (BENCHMARKS.parents[1] / "configs" / "runs" / f"{plan.stem}.gin").is_file(), plan
        output = tmp_path / page
        assert main(["report", *map(str, plans), "--output", str(output)]) == 0
        assert output.read_text() == (folder / page).read_text()
