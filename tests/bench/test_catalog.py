"""The catalog's benchmark, at the size that CI has time for: what it counts is asserted, what it times is not."""

import numpy as np
import pytest

from popax.bench.catalog.config import BenchCatalogConfig
from popax.bench.catalog.population import bulk_order, user_id
from popax.bench.catalog.run import bench_catalog
from popax.bench.residency import BenchResidencyConfig, bench_residency, simulated_hits, zipf_trace
from popax.errors import ConfigError
from popax.modeling.config import ModelConfig
from popax.store.records import user_key
from tests.sizes import size

MODEL = ModelConfig(
    vocab_size=4096, embed_dim=512, ffw_dim=1536, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=64
)


@pytest.mark.slow
def test_tens_of_thousands_of_users(tmp_path):
    users = size(10_000, whole_size=50_000)
    config = BenchCatalogConfig(users=users, large_users=64, layouts=(4, 16), loads=500, batch_loads=5, warm_loads=5)
    figures, rows = bench_catalog(MODEL, config, place=tmp_path / "catalog")
    assert (figures["users"], figures["row_bytes"], figures["large_row_bytes"]) == (users, 4096, 2_490_368)
    assert figures["wrong_adapters"] == 0
    assert figures["audited_revisions"] == figures["audited_rows"] == users + 64 + config.history_revisions - 1
    assert 0 < figures["overhead_bytes_per_user"] < 1024
    assert figures["large_row_bytes"] < figures["extract_large_read_bytes"] < 1.2 * figures["large_row_bytes"]
    for name in ("revisions_per_s", "open_s", "load_p50_ms", "load_p99_ms", "batched_1024_ms", "large_mb_per_s"):
        assert figures[name] > 0
    ways = {(row["users"], row["stored as"]): row for row in rows}
    files = [ways[16, way]["files"] for way in ("packed rows", "PEFT directories", "a tensor an array")]
    assert files == sorted(files)
    # An interrupted build goes on where it was: nothing is left to build, and there is no rate to report.
    figures, _ = bench_catalog(MODEL, config, place=tmp_path / "catalog")
    assert figures["revisions_per_s"] is None
    assert figures["audited_revisions"] == users + 64 + config.history_revisions - 1


def test_the_bulk_order_is_that_of_the_keys():
    order = bulk_order(500).tolist()
    assert sorted(order) == list(range(500))
    keys = [user_key(user_id(number)) for number in order]
    assert keys == sorted(keys)


@pytest.mark.slow
def test_a_trace_through_the_tiers_hits_as_two_lrus_do(tmp_path):
    sizes = {"users": 4_000, "requests": 6_000, "slots": 16, "host_users": 64, "waiters": 200}
    config = BenchResidencyConfig(**sizes, check_every=10, repeats=3)
    figures = bench_residency(MODEL, config)
    assert abs(figures["device_hit_rate"] - figures["simulated_device_hit_rate"]) < 0.01
    assert abs(figures["host_hit_rate"] - figures["simulated_host_hit_rate"]) < 0.01
    assert (figures["recompilations"], figures["wrong"], figures["checked"]) == (0, 0, 600)
    assert figures["one_cold_user_loads"] == 1
    assert figures["catalog_loads"] + figures["device_hit_rate"] * 6_000 < 6_000


def test_two_simulated_lrus_by_hand():
    """One slot above two users in the host: of 1 2 1 3 2 only the second 1 is met in the host."""
    assert simulated_hits(zipf_trace(BenchResidencyConfig(users=1100, requests=1)), 1, 1) == (0.0, 0.0)
    assert simulated_hits(np.array([1, 2, 1, 3, 2]), 1, 2) == (0.0, 1 / 5)
    assert simulated_hits(np.array([1, 1, 2, 1]), 2, 1) == (0.5, 0.0)


@pytest.mark.parametrize("wrong", [{"users": 10}, {"large_users": 1}, {"batch": 0}])
def test_what_measures_nothing_is_refused(wrong):
    with pytest.raises(ConfigError, match="BenchCatalogConfig"):
        BenchCatalogConfig(**wrong)
