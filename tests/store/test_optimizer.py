"""The optimizer's state beside a revision."""

import ml_dtypes
import numpy as np
import pytest

from popax.errors import CorruptRevisionError, RevisionNotFoundError
from popax.store import Catalog, Commit
from popax.store.database import Database
from popax.store.records import optimizer_key


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
    store, key = Database.open(place, create=False).kvstore, optimizer_key("ada", 1)
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
