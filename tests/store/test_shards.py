"""Rows staged in shards of their own are seen by nobody until one transaction publishes all of them."""

import json

import pytest

from popax.errors import ConflictError, RevisionNotFoundError
from popax.store import Catalog
from popax.store.catalog import Commit, Revision


def staged(catalog, cohort, make_adapter, users, shard, **options):
    commits = [Commit(user, make_adapter(seed), run="r", **options) for user, seed in users.items()]
    found = catalog.stage_batch(cohort, commits, shard=shard)
    return [Revision.from_dict(json.loads(json.dumps(one.to_dict()))) for one in found]  # as another process gets it


def test_nothing_of_any_shard_is_visible_before_it_is_published_and_all_is_after(
    catalog, cohort, place, make_adapter, same
):
    first = staged(catalog, cohort, make_adapter, {"ada": 1, "bob": 2}, shard=0)
    second = staged(catalog, cohort, make_adapter, {"carol": 3}, shard=1)
    fresh = Catalog.open(place, read_only=True)
    assert list(fresh.list()) == []
    with pytest.raises(RevisionNotFoundError):
        fresh.load("carol")
    catalog.publish(cohort, first + second, shards=2)
    reader = Catalog.open(place, read_only=True)
    assert [record.user for record in reader.list()] == ["ada", "bob", "carol"]
    for (adapter, manifest), seed, shard in zip(
        reader.load_batch(["ada", "bob", "carol"]), (1, 2, 3), (0, 0, 1), strict=True
    ):
        same(adapter, make_adapter(seed))
        assert (manifest.shard, manifest.revision) == (shard, 1)
    assert json.loads((place / "popax_catalog.json").read_text())["shards"] == 2


def test_a_refused_revision_refuses_those_of_all_shards(catalog, cohort, make_adapter):
    catalog.commit(cohort, "carol", make_adapter(0))
    entries = staged(catalog, cohort, make_adapter, {"ada": 1}, shard=1)
    entries += staged(catalog, cohort, make_adapter, {"carol": 3}, shard=2, parent=7)
    with pytest.raises(ConflictError, match="'carol': cannot commit on parent=7"):
        catalog.publish(cohort, entries, shards=3)
    assert [record.user for record in catalog.list()] == ["carol"]


def test_a_run_that_is_repeated_writes_nothing_twice(catalog, cohort, place, make_adapter, same):
    catalog.publish(cohort, staged(catalog, cohort, make_adapter, {"ada": 1}, shard=1), shards=2)
    assert staged(catalog, cohort, make_adapter, {"ada": 1}, shard=1) == []
    # A killed run left rows that were never published: they stay unseen, and the next ones lie elsewhere.
    lost = staged(catalog, cohort, make_adapter, {"bob": 5}, shard=1)
    again = staged(Catalog.open(place), cohort, make_adapter, {"bob": 6}, shard=1)
    assert again[0].row > lost[0].row
    catalog.publish(cohort, again, shards=2)
    same(catalog.load("bob")[0], make_adapter(6))
    assert len(catalog.history("bob")) == 1


def test_one_process_after_several_goes_on_in_the_first_shard(catalog, cohort, place, make_adapter, same):
    catalog.publish(cohort, staged(catalog, cohort, make_adapter, {"ada": 1}, shard=1), shards=2)
    alone = Catalog.open(place)
    assert alone.commit(cohort, "ada", make_adapter(2)).revision == 2
    same(alone.load("ada", 1)[0], make_adapter(1))
    same(alone.load("ada")[0], make_adapter(2))
