"""Sizes of adapters on real bases, against the papers' own counts."""

import json
from pathlib import Path

import pytest

from popax.cli.main import main

ROOT = Path(__file__).parents[2]
MODELS = [str(ROOT / "configs" / "models" / name) for name in ("qwen3_8b.gin", "kimi_k2.gin")]
REPORTS = ROOT / "docs" / "benchmarks"

# Qwen3-8B: 36 layers; (d_in, d_out) of q, k, v, o, gate, up, down.
QWEN = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 12288), (4096, 12288), (12288, 4096)]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    place = tmp_path_factory.mktemp("methods")
    assert main(["methods", *MODELS, "--json", str(place / "m.json"), "--output", str(place / "m.md")]) == 0
    return json.loads((place / "m.json").read_text()), (place / "m.md").read_text()


def test_numbers_of_a_user_are_the_closed_forms(told):
    sizes = {row["method"]: row["parameters"] for row in told[0]["rows"] if row["base"] == "qwen3_8b"}
    assert sizes["lora r16"] == 36 * sum(16 * (d + f) for d, f in QWEN)
    assert sizes["dora r16"] == sizes["lora r16"] + 36 * sum(2 * f for _, f in QWEN)
    assert sizes["lora mica r16"] == 36 * sum(16 * d for d, _ in QWEN)
    assert sizes["lora_xs r64"] == 36 * 7 * 64**2
    assert sizes["vera r256"] == 36 * sum(256 + f for _, f in QWEN)
    assert sizes["svf"] == 36 * sum(min(pair) for pair in QWEN)
    assert sizes["ia3"] == sizes["bias"] == 36 * sum(f for _, f in QWEN)
    assert sizes["reft r4"] == 36 * (2 * 4 * 4096 + 4)
    assert sizes["tiny_lora"] == 13
    assert sizes["tiny_lora 64 groups"] == 13 * 64


def test_chips_hold_the_base_and_a_million_users(told):
    """Kimi-K2 is 2.05 TB: 32 v5p of 95.74 GiB are its smallest slice, and half of one is too small."""
    rows = {(row["base"], row["method"]): row for row in told[0]["rows"]}
    tiny = rows["kimi_k2", "tiny_lora"]
    assert 2.0e12 < tiny["base_bytes"] < 2.1e12
    assert tiny["v5p"] == 32
    for row in rows.values():
        assert row["bytes_per_user"] == 2 * row["parameters"]
        needed = row["base_bytes"] + row["shared_bytes"] + row["bytes_per_million"]
        assert row["bytes_per_million"] == 10**6 * row["bytes_per_user"]
        if row["v5p"] is not None:
            chip = 95.74 * 2**30
            assert needed <= row["v5p"] * chip
            assert row["v5p"] == 1 or needed > row["v5p"] / 2 * chip
    assert rows["qwen3_8b", "lora r16"]["v5e"] is None


def test_the_page_is_what_the_command_prints(told):
    assert (REPORTS / "methods.md").read_text() == told[1]


def test_a_missing_model_is_one_line(capsys):
    assert main(["methods", "nowhere.gin"]) == 2
    assert "nowhere.gin" in capsys.readouterr().err
