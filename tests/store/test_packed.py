"""Records of users: what comes back is what was sealed, each bit counts, and what nobody asks for is not unpacked."""

import dataclasses
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popax.store import Catalog, Commit
from popax.store.manifest import Manifest
from popax.store.packed import StoredManifest, seal_user, unseal_user
from popax.store.reader import latest_manifest
from popax.store.records import BrokenRecordError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
HEX = "0123456789abcdef"
MANIFESTS = st.fixed_dictionaries(
    {
        "revision": st.integers(1, 2**32 - 1),
        "row": st.integers(0, 2**63),
        "cohort": st.text(HEX, min_size=32, max_size=32),
        "digest": st.text(HEX, min_size=64, max_size=64),
        "created": st.text(max_size=30),
    },
    optional={"shard": st.integers(1, 2**31), "metrics": JSON, "provenance": JSON, "codec": JSON, "run": st.text()},
)
RECORDS = st.fixed_dictionaries(
    {
        "user": st.text(min_size=1).filter(lambda user: user.isprintable()),
        "latest": st.integers(1, 2**32 - 1),
        "manifest": MANIFESTS,
    },
    optional={
        "oldest": st.integers(2, 2**31),
        "promotions": st.lists(st.integers(1, 2**31), min_size=1, max_size=8),
        "tags": st.dictionaries(st.text(max_size=9), st.integers(1, 2**31), min_size=1, max_size=3),
    },
)


@settings(max_examples=150)
@given(RECORDS)
def test_what_is_sealed_comes_back(record):
    back = unseal_user(seal_user(record))
    manifest = back["manifest"]
    assert {name: manifest.get(name) for name in record["manifest"]} == record["manifest"]
    assert dict(manifest) == {"shard": 0, **record["manifest"]}
    assert {**back, "manifest": None} == {**record, "manifest": None}
    # Sealed again, unpacked or not, it has the same bytes.
    assert seal_user(back) == seal_user(record)
    assert manifest.encoded == bool(record["manifest"].get("codec"))


def test_each_bit_counts():
    manifest = {"revision": 3, "row": 7, "cohort": "ab" * 16, "digest": "cd" * 32, "metrics": {"loss": 1.5}}
    data = seal_user({"user": "ada", "latest": 3, "manifest": manifest, "tags": {"best": 2}})
    for bit in range(8 * len(data)):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BrokenRecordError):
            unseal_user(bytes(broken))
    for length in range(len(data)):
        with pytest.raises(BrokenRecordError):
            unseal_user(data[:length])


def test_a_load_unpacks_nothing_that_nobody_asks_for(catalog, cohort, make_adapter, monkeypatch):
    users = [f"user-{at}" for at in range(5)]
    commits = [Commit(user, make_adapter(at), metrics={"loss": float(at)}) for at, user in enumerate(users)]
    made = catalog.commit_batch(cohort, [*commits, Commit("small", make_adapter(9), codec="int8")])
    reader, unpacked = Catalog.open(catalog.place), []
    original = StoredManifest.rest.fget
    monkeypatch.setattr(StoredManifest, "rest", property(lambda self: unpacked.append(self) or original(self)))
    _, manifests = reader.load_stacked(users)
    assert not unpacked
    assert manifests[3].metrics == {"loss": 3.0}
    assert len(set(map(id, unpacked))) == 1
    assert manifests == made[:5], "field by field"
    assert [manifest.to_dict() for manifest in manifests] == [manifest.to_dict() for manifest in made[:5]]
    assert reader.load("small")[1].codec["name"] == "int8"
    changed = dataclasses.replace(manifests[0], revision=9)
    assert (changed.metrics, changed.revision) == ({"loss": 0.0}, 9)
    with pytest.raises(AttributeError, match="a manifest has no 'colour'"):
        _ = manifests[0].colour


def test_many_threads_may_be_the_first_to_ask(catalog, cohort, make_adapter):
    catalog.commit(cohort, "ada", make_adapter(), metrics={"loss": 2.0}, run="r")
    names = [field.name for field in dataclasses.fields(Manifest)]
    for _ in range(50):
        [record] = catalog.records(["ada"])
        manifest = latest_manifest(record, {cohort.id: cohort}.get)
        start, failures = threading.Barrier(4), []

        def ask(manifest=manifest, start=start, failures=failures):
            start.wait()
            try:
                assert [getattr(manifest, name) for name in names][-1] == {"loss": 2.0}
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
