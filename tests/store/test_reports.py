"""Filters, counts, differences and Parquet: the same facts, seen from four sides."""

import json

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from popax.adapters.cohort import Cohort
from popax.errors import CatalogError
from popax.store import Catalog, RowLayout, UserFilter, difference, export_parquet, statistics


@pytest.fixture
def populated(catalog, cohort, config, specs, layout, make_adapter):
    """Three users of base-a (ada has three revisions, the second promoted, the first tagged), one of base-b."""
    for seed in range(3):
        catalog.commit(cohort, "acme/ada", make_adapter(seed), metrics={"loss": 1.0 - seed / 4, "note": "x"}, run="r")
    catalog.commit(cohort, "acme/bob", make_adapter(3))
    catalog.promote("acme/bob")
    catalog.promote("acme/ada", 2)
    catalog.tag("acme/ada", "first", 1)
    catalog.commit(cohort, "zoe", make_adapter(4))
    catalog.commit(catalog.cohort(config, specs, "base-b", layout), "yan", make_adapter(5))
    return catalog


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({}, ["acme/ada", "acme/bob", "yan", "zoe"]),
        ({"prefix": "acme/"}, ["acme/ada", "acme/bob"]),
        ({"base": "base-b"}, ["yan"]),
        ({"base": "base"}, ["acme/ada", "acme/bob", "yan", "zoe"]),
        ({"method": "lora_xs"}, []),
        ({"status": "promoted"}, ["acme/bob"]),
        ({"status": "candidate", "prefix": "acme/"}, ["acme/ada"]),
        ({"tag": "first"}, ["acme/ada"]),
        ({"since": "2020-01-01", "until": "2021-01-01T00:00:00Z"}, []),
        ({"since": "2020-01-01", "method": "lora"}, ["acme/ada", "acme/bob", "yan", "zoe"]),
        ({"cohort": "no such"}, []),
    ],
)
def test_filters_leave_those_who_are_meant(populated, where, expected):
    assert [record.user for record in populated.list(**where)] == expected


def test_times_are_compared_as_times(populated):
    created = populated.load("zoe")[1].created
    assert [record.user for record in populated.list("zoe", since=created)] == ["zoe"]
    assert populated.list("zoe", until=created) == []
    later = created.replace("+00:00", "-05:00")  # the same clock, five hours west: later
    assert populated.list("zoe", since=later) == []
    for wrong in ({"since": "yesterday"}, {"status": "live"}):
        with pytest.raises(CatalogError, match=r"yesterday|live"):
            UserFilter(**wrong)


def test_counts(populated, place, layout):
    found = statistics(populated)
    assert (found.users, found.revisions, found.promoted, found.tags) == (4, 6, 2, 1)
    assert [(one.base_digest, one.users, one.row_bytes) for one in found.cohorts] == [
        ("base-a", 3, layout.row_bytes),
        ("base-b", 1, layout.row_bytes),
    ]
    assert found.file_bytes == sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    json.dumps(found.to_dict())


def test_parquet_holds_every_revision_once(populated, tmp_path):
    path = tmp_path / "deep" / "revisions.parquet"
    assert export_parquet(populated, path, group=2) == 6
    rows = {f"{row['user']}@{row['revision']}": row for row in pq.read_table(path).to_pylist()}
    assert len(rows) == 6
    for name, row in rows.items():
        user, _, revision = name.rpartition("@")
        manifest = populated.load(user, int(revision))[1]
        assert json.loads(row["manifest"]) == json.loads(json.dumps(manifest.to_dict()))
        assert row["created"].isoformat(timespec="milliseconds") == manifest.created
        assert (row["digest"], row["parent"], row["method"]) == (manifest.digest, manifest.parent, "lora")
    assert [rows[f"acme/ada@{at}"]["is_promoted"] for at in (1, 2, 3)] == [False, True, False]
    assert rows["acme/ada@1"]["tags"] == ["first"]
    assert rows["acme/ada@3"]["metrics"] == [("loss", 0.5)]
    assert export_parquet(populated, path, where=UserFilter(prefix="acme/"), latest_only=True) == 2
    assert all(pq.read_table(path)["is_latest"].to_pylist())
    assert [entry.name for entry in path.parent.iterdir()] == ["revisions.parquet"]


def test_a_difference_is_that_of_the_merged_weights(populated, cohort, make_adapter):
    """||s (A'^T B' - A^T B)||_F of the weights themselves, in float64."""
    found = difference(populated, "acme/ada", "first", 3)
    assert found.fields["metrics.loss"] == (1.0, 0.5)
    assert found.fields["parent"] == (None, 2)
    assert "config.rank" not in found.fields
    one, other = make_adapter(0), make_adapter(2)
    for site in found.sites:
        scale = cohort.specs[site.site].scales[0]
        before, after = (
            scale * np.einsum("lrd,lrf->ldf", leaves["a"].astype(np.float64), leaves["b"].astype(np.float64))
            for leaves in (one[site.site], other[site.site])
        )
        np.testing.assert_allclose(site.before, np.linalg.norm(before), rtol=1e-5)
        np.testing.assert_allclose(site.after, np.linalg.norm(after), rtol=1e-5)
        np.testing.assert_allclose(site.change, np.linalg.norm(after - before), rtol=1e-5)
        cosine = (before * after).sum() / np.linalg.norm(before) / np.linalg.norm(after)
        np.testing.assert_allclose(site.cosine, cosine, atol=1e-6)
    assert len(found.sites) == 2


def test_a_difference_of_two_bases_is_one_of_records_only(populated, config, specs, layout, make_adapter):
    other = populated.find_cohort(config, "base-b", layout)
    populated.commit(other, "zoe", make_adapter(4))
    found = difference(populated, "zoe", 1, 2)
    assert found.sites == ()
    assert found.fields["base_digest"] == ("base-a", "base-b")


def test_a_fresh_adapter_differs_by_its_whole_update(place, config, specs):
    cohort = Cohort(config, tuple(specs.values()))
    catalog = Catalog.open(place, create=True)
    stored = catalog.cohort(config, specs, "base", RowLayout.of(cohort.abstract()))
    fresh = cohort.init(jax.random.key(0))
    catalog.commit(stored, "ada", fresh)
    catalog.commit(stored, "ada", jax.tree.map(lambda leaf: leaf + 1, fresh))
    for site in difference(catalog, "ada", 1, 2).sites:
        assert site.before == 0
        np.testing.assert_allclose(site.change, site.after, rtol=1e-6)
        assert np.isnan(site.cosine)
