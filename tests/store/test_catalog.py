import gc
import json
import weakref

import jax
import numpy as np
import pytest
import tensorstore as ts

from popax.errors import (
    BaseMismatchError,
    CatalogError,
    ConflictError,
    CorruptRevisionError,
    PopulationError,
    RevisionNotFoundError,
)
from popax.store import Catalog, Commit, Manifest, RowLayout
from popax.store.database import Database
from popax.store.records import row_key


def test_a_revision_comes_back_bit_for_bit_with_its_record(catalog, cohort, make_adapter, same, place):
    """Invariant 6 at the catalog's edge: what is loaded is what was committed."""
    adapter = make_adapter(1)
    committed = catalog.commit(
        cohort,
        "ada",
        adapter,
        metrics={"bits_per_byte": np.float32(1.5), "steps": np.int64(3)},
        provenance={"range": (0, 10)},
        hparams={"learning_rate": 1e-3},
        run="run-1",
    )
    for opened in (catalog, Catalog.open(place, read_only=True)):
        found, manifest = opened.load("ada", base_digest="base-a")
        same(found, adapter)
        assert manifest == committed
    assert committed.name == "ada@1"
    assert (committed.revision, committed.parent, committed.run) == (1, None, "run-1")
    assert committed.metrics == {"bits_per_byte": 1.5, "steps": 3}
    assert committed.provenance == {"range": [0, 10]}
    assert committed.base_digest == "base-a"
    assert committed.config == cohort.config.to_dict()
    assert Manifest.from_dict(json.loads(json.dumps(committed.to_dict()))) == committed


def test_revisions_are_immutable_and_numbered(catalog, cohort, make_adapter, same):
    for seed in range(5):
        catalog.commit(cohort, "ada", make_adapter(seed))
    before = catalog.history("ada")
    catalog.commit(cohort, "ada", make_adapter(9), parent=5)
    assert catalog.history("ada")[:5] == before
    assert [manifest.parent for manifest in before] == [None, 1, 2, 3, 4]
    assert len({manifest.row for manifest in catalog.history("ada")}) == 6
    for seed in range(5):
        same(catalog.load("ada", seed + 1)[0], make_adapter(seed))
    same(catalog.load("ada")[0], make_adapter(9))


def test_a_batch_is_committed_and_loaded_in_order(catalog, cohort, make_adapter, same):
    users = [f"user-{index}" for index in range(20)]
    manifests = catalog.commit_batch(cohort, [Commit(user, make_adapter(i)) for i, user in enumerate(users)])
    assert [manifest.user for manifest in manifests] == users
    order = users[::-3] + users[:2]
    for user, (adapter, manifest) in zip(order, catalog.load_batch(order), strict=True):
        assert manifest.user == user
        same(adapter, make_adapter(users.index(user)))
    assert catalog.commit_batch(cohort, []) == []
    assert catalog.load_batch([]) == []


def test_one_bad_adapter_keeps_the_whole_batch_out(catalog, cohort, make_adapter):
    bad = make_adapter() | {"extra": {"a": np.zeros(1, np.float32)}}
    with pytest.raises(PopulationError, match="extra/a"):
        catalog.commit_batch(cohort, [Commit("ada", make_adapter()), Commit("bob", bad)])
    assert not catalog.exists("ada")


def test_listing(catalog, cohort, make_adapter):
    for user in ("acme/ada", "acme/bob", "other/ada"):
        catalog.commit(cohort, user, make_adapter())
    catalog.commit(cohort, "acme/bob", make_adapter(1))
    assert [(record.user, record.latest, record.promoted) for record in catalog.list("acme/")] == [
        ("acme/ada", 1, None),
        ("acme/bob", 2, None),
    ]
    assert len(catalog.list()) == 3
    assert catalog.list("nobody") == []


def test_unknown_users_and_revisions_are_named(catalog, cohort, make_adapter):
    catalog.commit(cohort, "ada", make_adapter())
    assert catalog.exists("ada")
    assert not catalog.exists("bob")
    for ask in (catalog.load, catalog.history):
        with pytest.raises(RevisionNotFoundError, match="'bob'"):
            ask("bob")
    for revision in (0, 2, -1):
        with pytest.raises(RevisionNotFoundError, match=f"revisions 1 to 1, there is no revision {revision}"):
            catalog.load("ada", revision)


def test_an_adapter_of_another_base_is_refused(catalog, cohort, make_adapter):
    catalog.commit(cohort, "ada", make_adapter())
    with pytest.raises(BaseMismatchError, match="'ada'@1 was made for the base base-a, not for base-b"):
        catalog.load("ada", base_digest="base-b")


def test_cohorts_are_registered_once_and_hold_all_that_reading_needs(catalog, config, specs, layout, place):
    shared = {"layers.attn.q_proj": {"u": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    cohort = catalog.cohort(config, specs, "base-a", layout, shared)
    assert (
        cohort
        == catalog.cohort(config, specs, "base-a", layout, shared)
        == catalog.cohort(config, specs, "base-a", layout)
    )
    assert cohort.id != catalog.cohort(config, specs, "base-b", layout).id
    reader = Catalog.open(place, read_only=True)
    found = reader.find_cohort(config, "base-a", layout)
    assert found == cohort
    assert list(found.specs.items()) == list(specs.items())
    np.testing.assert_array_equal(reader.shared(found)["layers.attn.q_proj"]["u"], shared["layers.attn.q_proj"]["u"])
    assert reader.shared(reader.cohort(config, specs, "base-b", layout)) == {}
    assert reader.find_cohort(config, "base-c", layout) is None
    with pytest.raises(CatalogError, match=r"use catalog\.shared"):
        catalog.cohort(config, specs, "base-a", layout, {"layers.attn.q_proj": {"u": np.zeros((2, 3), np.float32)}})


def test_users_of_different_cohorts_load_together(catalog, cohort, config, specs, make_adapter, same):
    half = {
        site: {name: leaf.astype(np.float16) for name, leaf in leaves.items()}
        for site, leaves in make_adapter(2).items()
    }
    other = catalog.cohort(config, specs, "base-a", RowLayout.of(half))
    catalog.commit(cohort, "ada", make_adapter(1))
    catalog.commit(other, "bob", half)
    (ada, first), (bob, second) = catalog.load_batch(["ada", "bob"])
    same(ada, make_adapter(1))
    same(bob, half)
    assert catalog.cohort_of(first) == cohort
    assert catalog.cohort_of(second) == other


def test_parents(catalog, cohort, make_adapter):
    catalog.commit(cohort, "ada", make_adapter(), parent=None)
    with pytest.raises(ConflictError, match=r"parent=None, its latest revision is 1"):
        catalog.commit(cohort, "ada", make_adapter(1), parent=None)
    with pytest.raises(ConflictError, match=r"parent=7, its latest revision is 1"):
        catalog.commit(cohort, "ada", make_adapter(1), parent=7)
    with pytest.raises(ConflictError, match=r"parent=1, it has no revision yet"):
        catalog.commit(cohort, "bob", make_adapter(1), parent=1)
    assert catalog.commit(cohort, "ada", make_adapter(1), parent=1).revision == 2
    with pytest.raises(ConflictError, match="'ada' appears twice"):
        catalog.commit_batch(cohort, [Commit("ada", make_adapter()), Commit("ada", make_adapter())])


def test_a_resumed_run_commits_the_same_bytes_once(catalog, cohort, make_adapter):
    first = catalog.commit(cohort, "ada", make_adapter(1), run="r", parent=None)
    assert catalog.commit(cohort, "ada", make_adapter(1), run="r", parent=None) == first
    assert catalog.commit(cohort, "ada", make_adapter(1), run="r") == first
    mixed = catalog.commit_batch(
        cohort, [Commit("bob", make_adapter(2), run="r"), Commit("ada", make_adapter(1), run="r")]
    )
    assert [manifest.name for manifest in mixed] == ["bob@1", "ada@1"]
    assert len(catalog.history("ada")) == 1
    assert catalog.commit(cohort, "ada", make_adapter(3), run="r").revision == 2
    assert catalog.commit(cohort, "ada", make_adapter(3), run="other").revision == 3
    assert catalog.commit(cohort, "ada", make_adapter(3)).revision == 4
    assert catalog.commit(cohort, "ada", make_adapter(3)).revision == 5


def test_opening(tmp_path, catalog, cohort, place, make_adapter):
    with pytest.raises(CatalogError, match="create=True"):
        Catalog.open(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(CatalogError, match="bogus"):
        Catalog.open("bogus://nowhere")
    with pytest.raises(CatalogError, match="read-only"):
        Catalog.open(place, read_only=True).commit(cohort, "ada", make_adapter())
    (place / "popax_catalog.json").write_text('{"format": 4, "shards": 1}')
    with pytest.raises(CatalogError, match="format 4"):
        Catalog.open(place)
    (place / "popax_catalog.json").write_text("[")
    with pytest.raises(CatalogError, match="not a catalog's marker"):
        Catalog.open(place)


def test_a_catalog_in_memory(config, specs, layout, make_adapter, same):
    context = ts.Context()
    catalog = Catalog.open("memory://", create=True, context=context)
    catalog.commit(catalog.cohort(config, specs, "base-a", layout), "ada", make_adapter(4))
    same(Catalog.open("memory://", context=context).load("ada")[0], make_adapter(4))


def test_a_directory_whose_name_looks_like_an_escape(tmp_path, config, specs, layout, make_adapter):
    place = tmp_path / "a b%20?#"
    catalog = Catalog.open(place, create=True)
    catalog.commit(catalog.cohort(config, specs, "base-a", layout), "ada", make_adapter())
    assert Catalog.open(place).exists("ada")
    assert [path.name for path in tmp_path.iterdir()] == ["a b%20?#"]


def test_a_path_may_go_up(tmp_path, monkeypatch, config, specs, layout, make_adapter):
    """`--catalog ../run/catalog`: TensorStore itself takes no such path."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    catalog = Catalog.open("../catalog", create=True)
    catalog.commit(catalog.cohort(config, specs, "base-a", layout), "ada", make_adapter())
    assert Catalog.open(tmp_path / "catalog").exists("ada")


def test_what_is_not_json_is_refused_before_anything_is_written(catalog, cohort, make_adapter):
    with pytest.raises(CatalogError, match="JSON"):
        catalog.commit(cohort, "ada", make_adapter(), metrics={"x": object()})
    assert not catalog.exists("ada")


def test_a_catalog_is_gone_with_its_last_reference(catalog, cohort, make_adapter, place):
    """Without the garbage collector: its cache of nodes, hundreds of megabytes, must not wait for one."""
    catalog.commit(cohort, "ada", make_adapter(), codec="int8")
    gc.collect()
    gc.disable()
    try:
        reader = Catalog.open(place, read_only=True)
        reader.load_stacked(["ada"])
        reader.verify()
        database = weakref.ref(reader._database)
        del reader
        assert database() is None
    finally:
        gc.enable()


def test_many_are_stacked_whatever_their_rows_lie_in(catalog, cohort, make_adapter, place, same):
    """Of one array in one read, of several (other shards, other forms, superseded ones) one by one: the same rows."""
    users = [f"user-{at}" for at in range(6)]
    catalog.commit_batch(cohort, [Commit(user, make_adapter(at)) for at, user in enumerate(users)])
    staged = catalog.stage_batch(cohort, [Commit("apart", make_adapter(7))], shard=1)
    catalog.publish(cohort, staged, shards=2)
    catalog.commit(cohort, "twice", make_adapter(8))
    catalog.commit(cohort, "twice", make_adapter(9))
    reader = Catalog.open(place, read_only=True)

    def stacked(names, revision=None):
        found, manifests = reader.load_stacked(names, revision)
        assert [manifest.user for manifest in manifests] == list(names)
        return [jax.tree.map(lambda leaf, at=at: leaf[at], found) for at in range(len(names))]

    for found, seed in zip(stacked([*users[::-1], users[0]]), [5, 4, 3, 2, 1, 0, 0], strict=True):
        same(found, make_adapter(seed))
    for found, seed in zip(stacked([users[1], "apart", "twice"]), [1, 7, 9], strict=True):
        same(found, make_adapter(seed))
    for found, seed in zip(stacked([users[1], "twice"], 1), [1, 8], strict=True):
        same(found, make_adapter(seed))
    catalog.commit(cohort, "small", make_adapter(3), codec="int8")
    assert len(stacked([users[3], "small"])) == 2
    with pytest.raises(PopulationError, match="0 users of 0 cohorts"):
        reader.load_stacked([])


def test_a_broken_row_among_many_is_named_and_so_is_one_that_is_gone(catalog, cohort, make_adapter, place):
    catalog.commit_batch(cohort, [Commit(f"user-{at}", make_adapter(at)) for at in range(6)])
    manifest = catalog.load("user-4")[1]
    store, key = Database.open(place, create=False).kvstore, row_key(manifest.array, manifest.row)
    good = bytearray(store.read(key).result().value)
    users = [f"user-{at}" for at in range(6)]
    good[9] ^= 32
    for broken in (bytes(good), None):
        store.write(key, broken).result()
        with pytest.raises(CorruptRevisionError, match="'user-4'@1"):
            Catalog.open(place, read_only=True).load_stacked(users)
