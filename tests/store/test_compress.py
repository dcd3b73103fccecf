"""Compressed rows: derived revisions that say what they cost, and are loaded, audited and deleted like all others."""

import dataclasses

import numpy as np
import pytest

from popax.errors import CatalogError, CorruptRevisionError
from popax.store import Catalog, Commit
from popax.store.codec import CODECS
from popax.store.compress import EveryFew, compress
from popax.store.database import Database
from popax.store.records import row_key


def _error(one, other):
    difference = sum(float(((one[s][n] - other[s][n]) ** 2).sum()) for s in one for n in one[s])
    return (difference / sum(float((one[s][n] ** 2).sum()) for s in one for n in one[s])) ** 0.5


@pytest.fixture
def users(catalog, cohort, make_adapter):
    names = [f"user-{seed}" for seed in range(6)]
    catalog.commit_batch(cohort, [Commit(name, make_adapter(seed)) for seed, name in enumerate(names)])
    return names


@pytest.mark.parametrize("codec", CODECS)
def test_a_compressed_revision_says_what_it_cost(catalog, users, make_adapter, place, codec):
    done = compress(catalog, users, form=codec, max_error=1.0)
    reader = Catalog.open(place, read_only=True)
    for seed, (user, one) in enumerate(zip(users, done, strict=True)):
        adapter, manifest = reader.load(user)
        assert (one.source, one.revision, manifest.revision) == (1, 2, 2)
        assert manifest.codec == {"name": codec, "error": pytest.approx(_error(make_adapter(seed), adapter), rel=1e-5)}
        assert manifest.derived_from[0][:2] == (user, 1)
        assert one.bytes_after < one.bytes_before / (3 if codec == "int8" else 5)
        assert reader.load(user, 1)[1].codec is None
        assert reader.records([user])[0].promoted is None
    audit = reader.verify()
    assert audit.clean
    assert (audit.revisions, audit.orphan_rows) == (12, 0)
    assert reader.load_stacked(users)[0]["layers.attn.q_proj"]["a"].shape[0] == 6


def test_who_would_lose_too_much_is_left_as_they_are(catalog, users, make_adapter, same):
    errors = {one.user: one.error for one in compress(catalog, users, form="int4", max_error=0.0)}
    assert all(error > 0.01 for error in errors.values())
    assert catalog.list() == [dataclasses.replace(record, latest=1) for record in catalog.list()]
    middle = sorted(errors.values())[3]
    done = compress(catalog, users, form="int4", max_error=middle)
    assert {one.user for one in done if one.revision} == {user for user, error in errors.items() if error <= middle}
    for one in done:
        if one.revision is None:
            same(catalog.load(one.user)[0], make_adapter(users.index(one.user)))
    # What is compressed is not compressed again.
    smaller = [one.user for one in done if one.revision]
    assert all(one.revision is None for one in compress(catalog, smaller, form="int8", max_error=1.0))


def test_the_original_can_be_pruned_and_all_of_it_deleted(catalog, users, cohort, layout, make_adapter, place):
    compress(catalog, users, form="int8", max_error=1.0)
    for user in users:
        catalog.prune(user, before=2)
    catalog.delete(users[0])
    catalog.gc(grace_s=0)
    audit = catalog.verify()
    assert audit.clean
    assert (audit.revisions, audit.orphan_rows) == (5, 0)
    files = b"".join(path.read_bytes() for path in place.rglob("*") if path.is_file())
    assert all(layout.pack(make_adapter(seed)).tobytes() not in files for seed in range(6))
    assert catalog.commit(cohort, users[1], make_adapter(9)).codec is None


def test_plain_and_encoded_rows_in_one_batch(catalog, cohort, make_adapter, same):
    commits = [Commit("a", make_adapter(1)), Commit("b", make_adapter(2), codec="int8"), Commit("c", make_adapter(3))]
    made = catalog.commit_batch(cohort, [*commits, Commit("d", make_adapter(4), codec="int4")])
    assert [one.codec and one.codec["name"] for one in made] == [None, "int8", None, "int4"]
    same(catalog.load("a")[0], make_adapter(1))
    same(catalog.load("c")[0], make_adapter(3))
    for user, seed, bound in (("b", 2, 0.02), ("d", 4, 0.3)):
        assert 0 < _error(make_adapter(seed), catalog.load(user)[0]) < bound
    staged = catalog.stage_batch(cohort, [Commit("e", make_adapter(5), codec="int8")], shard=1)
    [published] = catalog.publish(cohort, staged, shards=2)
    assert published.codec["name"] == "int8"
    assert catalog.verify().clean


def test_a_broken_encoded_row_is_named(catalog, users, place):
    compress(catalog, users[:1], form="int8", max_error=1.0)
    manifest = catalog.load(users[0])[1]
    store, key = Database.open(place, create=False).kvstore, row_key(manifest.array, manifest.row)
    good = np.frombuffer(store.read(key).result().value, np.uint8).copy()
    good[5] ^= 1
    store.write(key, good.tobytes()).result()
    with pytest.raises(CorruptRevisionError, match="'user-0'@2"):
        Catalog.open(place).load(users[0])


def test_an_unknown_codec_is_named(catalog, cohort, make_adapter):
    with pytest.raises(CatalogError, match="'int3': one of int8, int4"):
        catalog.commit(cohort, "a", make_adapter(), codec="int3")
    assert not catalog.exists("a")


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 100, 1000])
def test_a_sample_is_bounded_and_evenly_spread(count):
    few = EveryFew(8)
    for number in range(count):
        few.add(number)
    assert min(count, 4) <= len(few.taken) <= 8
    assert len({later - earlier for earlier, later in zip(few.taken, few.taken[1:], strict=False)}) <= 1
    assert count < 8 or few.taken[-1] >= count - 1 - (few.taken[1] - few.taken[0])
