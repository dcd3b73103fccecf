"""The Scale Down curve in small: seeds and rates are members, and a member is what it would be in a run of its own."""

import json

import numpy as np
import pytest

from popax.bench.curve.choice import choices
from popax.bench.curve.config import CurveConfig
from popax.bench.curve.run import members_of
from popax.cli.main import main

CURVE = """
CurveConfig.users = 3
CurveConfig.adapters = (@big/AdapterConfig(), @small/AdapterConfig())
big/AdapterConfig.rank = 2
small/AdapterConfig.method = 'tiny_lora'
small/AdapterConfig.rank = 2
"""


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    place = tmp_path_factory.mktemp("curve")
    (place / "curve.gin").write_text(CURVE)

    def command(name, *params):
        files = ["--gin_file", world.users, "--gin_file", str(place / "curve.gin")]
        bindings = [word for param in params for word in ("--gin_param", param)]
        data = ["--base", world.base, "--data", world.data, "--users_with_at_least", "8"]
        out = ["--json", str(place / f"{name}.json"), "--picture", str(place / f"{name}.png")]
        return main(["bench", "curve", *files, *bindings, *data, *out]), place / f"{name}.json"

    return command


def test_a_member_is_what_it_is_in_a_run_of_its_own(run, capsys):
    code, whole = run("whole", "CurveConfig.seeds = 2", "CurveConfig.rates = (1.0, 4.0)")
    assert code == 0
    assert "tiny_lora r2" in capsys.readouterr().out
    report = json.loads(whole.read_text())
    rows = report["rows"]
    assert len(rows) == 2 * 2 * 2
    assert {row["method"]: row["parameters"] for row in rows}["tiny_lora r2"] == 13
    assert whole.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    own = {(row["method"], row["rate"], row["seed"]): row for row in rows}
    assert own["lora r2", 1.0, 0]["own"] != own["lora r2", 1.0, 1]["own"]
    _, single = run("single", "CurveConfig.seeds = 1", "CurveConfig.rates = (4.0,)")
    for row in json.loads(single.read_text())["rows"]:
        same = own[row["method"], 4.0, 0]
        for name in ("base", "own", "wrong", "gain", "validation"):
            assert row[name] == pytest.approx(same[name], abs=1e-4)
        assert np.mean(row["gains"]) == pytest.approx(row["gain"])
    for method, choice in choices(rows).items():
        assert report["figures"][f"gain of {method}"] == pytest.approx(choice.gain_S.mean())
        at_one = [row["gain"] for row in rows if (row["method"], row["rate"]) == (method, 1.0)]
        assert report["figures"][f"gain of {method} at its own rate"] == pytest.approx(np.mean(at_one))


def test_a_users_rate_is_what_suits_the_others():
    """Users 1 and 2 gain most at rate 2, user 0 at rate 4, by far: user 0 gets 2, and they get what 0 decides."""
    gains = {1.0: [0.0, 0.1, 0.1], 2.0: [0.1, 0.3, 0.3], 4.0: [5.0, 0.2, 0.2]}
    rows = [
        {"method": "m", "bytes": 4, "rate": rate, "seed": seed, "gains": own, "losses": [seed, seed, seed]}
        for rate, own in gains.items()
        for seed in (0, 1)
    ]
    [choice] = choices(rows).values()
    assert choice.rate_U.tolist() == [2.0, 4.0, 4.0]
    assert choice.rate == 4.0
    np.testing.assert_allclose(choice.gain_S, [(0.1 + 0.2 + 0.2) / 3] * 2)
    np.testing.assert_allclose(choice.lost_S, [0.0, 1.0])
    np.testing.assert_allclose(choice.own_S, [0.2 / 3] * 2)


def test_who_is_who():
    who = members_of(CurveConfig(users=3, seeds=2, rates=(0.5, 2.0)), ["a", "b", "c"])
    assert len(who.names) == 12
    assert who.names[:4] == ["a", "b", "c", "a"]
    for member, wrong in enumerate(who.wrong_N):
        assert who.user_N[wrong] == (who.user_N[member] + 1) % 3
        assert who.seed_N[wrong] == who.seed_N[member]
        assert who.rate_N[wrong] == who.rate_N[member]


@pytest.mark.parametrize(
    ("param", "words"),
    [
        ("CurveConfig.users = 99", "99 (CurveConfig.users) are asked for"),
        ("CurveConfig.users = 1", "users=1"),
        ("CurveConfig.rates = (0.0,)", "rates"),
    ],
)
def test_bad_input_is_one_line(run, capsys, param, words):
    code, report = run("bad", param)
    assert code == 2
    assert words in capsys.readouterr().err
    assert not report.exists()
