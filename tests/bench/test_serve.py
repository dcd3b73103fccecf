"""The serving benchmark on a tiny model: what it counts is asserted, what it times is not."""

import pytest

from popax.bench.serve.config import BenchServeConfig
from popax.bench.serve.load import wishes, zipf_users
from popax.bench.serve.run import bench_serve
from popax.errors import ConfigError
from popax.modeling.config import ModelConfig
from popax.serving.programs import EngineShapes

MODEL = ModelConfig(
    vocab_size=264, embed_dim=32, ffw_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_seq_len=128
)
SHAPES = EngineShapes(rows=(8,), groups=4, width=8, context=128, contexts=(), page=8)


@pytest.mark.slow
def test_thousands_of_requests_of_many_users_leave_nothing_behind():
    """Acceptance 3: 10,000 requests over 1,000 users: nothing compiles, nothing stays taken, memory is flat."""
    config = BenchServeConfig(
        users=1_000, slots=8, rank=2, host_bytes=1 << 18, decode_rounds=2, decode_tokens=8, trace=60, arrivals=40,
        prompt=(4, 24), output=(2, 8), churn=10_000,
    )  # fmt: skip
    figures = bench_serve(MODEL, config, SHAPES)
    assert figures["requests"] == 3 * 2 * 8 + 2 * 60 + 2 * 40 + 10_000
    assert (figures["errors"], figures["compilations_after_ready"]) == (0, 0)
    assert (figures["pages_left"], figures["slots_left"]) == (0, 0)
    assert abs(figures["rss_growth"]) < 0.05
    assert 0 < figures["allowed_ratio"] < 1
    for name in ("decode_ratio", "zipf_ratio", "ttft_p95_warm_ratio"):
        assert figures[name] > 0


def test_who_asks_and_how_often():
    import numpy as np

    rng = np.random.default_rng(0)
    numbers = zipf_users(20_000, 100, 1.0, rng)
    counts = np.bincount(numbers, minlength=100)
    wanted = 20_000 / np.arange(1, 101) / (1 / np.arange(1, 101)).sum()
    np.testing.assert_allclose(counts[:10], wanted[:10], rtol=0.15)
    asked = wishes(["a", "b"] * 50, (3, 5), (1, 1), rng)
    assert {len(wish.prompt) for wish in asked} == {3, 4, 5}
    assert {wish.new for wish in asked} == {1}


@pytest.mark.parametrize("wrong", [{"users": 3}, {"prompt": (5, 2)}, {"load": 1.0}, {"cold": 0}, {"users": 70}])
def test_what_measures_nothing_is_refused(wrong):
    with pytest.raises(ConfigError, match="BenchServeConfig"):
        BenchServeConfig(**wrong)
