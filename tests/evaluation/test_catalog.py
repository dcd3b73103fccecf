"""What a table of a catalog shows on a screen."""

import math

from popax.evaluation.catalog import table_lines
from popax.evaluation.columns import UserScores, figures


def test_a_table_shows_the_first_users_the_mean_and_the_wins():
    rows = [
        UserScores(user=f"user-{i}\n", target_bytes=5, base=2.0 + i, shared=math.nan, own=1.0, wrong=3.0)
        for i in range(4)
    ]
    lines = list(table_lines(rows, figures(rows), max_rows=2))
    assert lines[0].split() == ["bits", "per", "byte", "base", "shared", "own", "wrong"]
    assert lines[1].split() == [r"'user-0\n'", "2.000", "-", "1.000", "3.000"]
    assert lines[3] == "... and 2 more users"
    assert lines[4].split() == ["mean", "3.500", "-", "1.000", "3.000"]
    assert lines[5] == "of 4 users, the own adapter beats: base 100%, shared -, another user's 100%"
    assert all("\n" not in line for line in lines)
