"""`popax bench mixing` in small: whose numbers are whose, and one program for all searches."""

import json

import pytest

from popax.bench.mixing import verdict
from popax.cli.main import main

MIXING = """
MixingConfig.experts = 2
MixingConfig.users = 2
MixingConfig.rows = 2
MixingConfig.held_out_rows = 3
MixingConfig.search = @CEMConfig()
CEMConfig.population = 4
CEMConfig.generations = 3
MixingConfig.descent_steps = 3
"""


@pytest.fixture(scope="module")
def arguments(world, tmp_path_factory):
    place = tmp_path_factory.mktemp("mixing")
    (place / "mixing.gin").write_text(MIXING)
    files = ["--gin_file", world.users, "--gin_file", str(place / "mixing.gin")]
    return ["bench", "mixing", *files, "--base", world.base, "--data", world.data, "--json", str(place / "mixing.json")]


def test_each_held_out_user_is_scored_with_every_mix(arguments, capsys):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "search beats every expert" in out
    assert "The search is ahead of every single expert for" in out
    with open(arguments[-1], encoding="utf-8") as file:
        report = json.load(file)
    assert len(report["rows"]) == 2
    for row in report["rows"]:
        assert len(row["experts"]) == 2
        assert row["best_expert"] == min(row["experts"])
        assert {row["chosen_expert"], row["classified_expert"]} <= set(row["experts"])
        assert len({row["base"], row["equal"], row["search"], row["descent"], *row["experts"]}) == 6
        # Descent goes down on what it learns from; the search's mean is of its best candidates there.
        assert row["past_descent"] < row["past_equal"]
        assert all(0.0 <= share <= 1.0 for share in row["share_of_each"])
    figures = report["figures"]
    assert report["config"]["verdict"] == verdict(figures)
    assert "does what it is for" in verdict(figures | {"search beats every expert": 0.7})
    assert "fewer than 70%: it does not" in verdict(figures | {"search beats every expert": 0.6})
    assert figures["search programs"] == 1
    assert figures["mean base"] == pytest.approx(sum(row["base"] for row in report["rows"]) / 2)


def test_too_few_users_are_an_error(arguments, capsys):
    assert main([*arguments, "--gin_param", "MixingConfig.users = 999"]) == 2
    assert "2 experts and 999 others are asked for" in capsys.readouterr().err
