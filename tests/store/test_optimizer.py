"""The optimizer's state beside a revision."""

import ml_dtypes
import numpy as np
import pytest

from popax.errors import CorruptRevisionError, RevisionNotFoundError
from popax.store import Catalog, Commit
from popax.store.database import Database
from popax.store.records import row_key


def _state(seed):
    rng = np.random.default_rng(seed)
    return {"mu": {"q": rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16)}, "count": np.int32(seed)}


def test_each_revision_has_its_own_state_or_none(catalog, cohort, make_adapter, place):
    catalog.commit_batch(cohort, [Commit("ada", make_adapter(0), optimizer=_state(0)), Commit("bob", make_adapter(1))])
    catalog.commit(cohort, "ada", make_adapter(2), optimizer=_state(2))
    reader = Catalog.open(place, read_only=True)
    for revision, seed in ((1, 0), (2, 2)):
        found = reader.load_optimizer(reader.load("ada", revision)[1])
        assert found["count"] == seed
        assert found["count"].dtype == np.int32
        np.testing.assert_array_equal(found["mu"]["q"], _state(seed)["mu"]["q"], strict=True)
    with pytest.raises(RevisionNotFoundError, match="'bob'@1 was committed without its optimizer's state"):
        reader.load_optimizer(reader.load("bob")[1])
    assert reader.verify().optimizer_states == 2


def test_a_changed_state_is_named(catalog, cohort, make_adapter, place):
    manifest = catalog.commit(cohort, "ada", make_adapter(), optimizer=_state(1))
    store = Database.open(place, create=False).kvstore
    key = row_key(manifest.optimizer_array, manifest.optimizer["row"])
    changed = bytearray(store.read(key).result().value)
    changed[3] ^= 4
    store.write(key, bytes(changed)).result()
    with pytest.raises(CorruptRevisionError, match="the optimizer's state of 'ada'@1"):
        Catalog.open(place).load_optimizer(manifest)
    [problem] = Catalog.open(place).verify().problems
    assert (problem.user, problem.revision) == ("ada", 1)
    store.write(key, None).result()
    with pytest.raises(CorruptRevisionError, match="the optimizer's state of 'ada'@1"):
        Catalog.open(place).load_optimizer(manifest)


def test_a_state_lies_in_the_shard_of_its_revision(catalog, cohort, make_adapter, place):
    """As several processes commit: each writes into its own shard, one of them publishes."""
    staged = []
    for shard, user in ((0, "ada"), (1, "bob")):
        commits = [Commit(user, make_adapter(shard), optimizer=_state(shard))]
        staged += [type(one).from_dict(one.to_dict()) for one in catalog.stage_batch(cohort, commits, shard=shard)]
    catalog.publish(cohort, staged, shards=2)
    reader = Catalog.open(place, read_only=True)
    for shard, user in ((0, "ada"), (1, "bob")):
        assert reader.load_optimizer(reader.load(user)[1])["count"] == shard
    audit = reader.verify()
    assert (audit.optimizer_states, audit.orphan_rows, audit.clean) == (2, 0, True)
    catalog.delete("bob")
    audit = Catalog.open(place, read_only=True).verify()
    assert (audit.optimizer_states, audit.orphan_rows) == (1, 0)


def test_the_rows_of_an_unpublished_state_are_found_and_removed(catalog, cohort, make_adapter, place):
    catalog.stage_batch(cohort, [Commit("ada", make_adapter(0), optimizer=_state(0))], shard=0)
    assert Catalog.open(place, read_only=True).verify().orphan_rows == 2
    catalog.gc(grace_s=0)
    assert Catalog.open(place, read_only=True).verify().orphan_rows == 0
