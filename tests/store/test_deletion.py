"""A deleted user is gone, and what holds something of the user is known (invariant 8)."""

import numpy as np
import pytest

from popax.errors import CatalogError, RevisionNotFoundError
from popax.store import Catalog
from popax.store.database import Database
from popax.store.deletion import Derived
from popax.store.records import user_hash


@pytest.fixture
def family(catalog, cohort, make_adapter):
    """ada and bob; carol was merged from both, dave distilled from carol, erin has nothing to do with them."""
    for seed in range(3):
        catalog.commit(cohort, "ada", make_adapter(seed), optimizer={"mu": np.full(4, seed, np.float32)})
    catalog.commit(cohort, "bob", make_adapter(10))
    catalog.commit(cohort, "carol", make_adapter(11), derived_from=[("ada", 2), ("bob", 1)])
    catalog.commit(cohort, "dave", make_adapter(12), derived_from=[("carol", 1)])
    catalog.commit(cohort, "erin", make_adapter(13))
    return catalog


def test_a_deleted_user_is_gone_and_the_others_are_as_they_were(family, place, make_adapter, same):
    family.tag("ada", "x")
    family.promote("ada")
    deletion = family.delete("ada")
    assert (deletion.user, deletion.revisions) == ("ada", 3)
    for opened in (family, Catalog.open(place)):
        assert not opened.exists("ada")
        with pytest.raises(RevisionNotFoundError, match="'ada'"):
            opened.load("ada", 1)
        assert [record.user for record in opened.list()] == ["bob", "carol", "dave", "erin"]
        same(opened.load("carol")[0], make_adapter(11))
        assert opened.verify().clean
        assert opened.verify().orphan_rows == opened.verify().orphan_records == 0
    database = Database.open(place, create=False)
    left = [key.decode() for key in database.kvstore.list().result() if user_hash("ada") in key.decode()]
    # What stays under the user's hash says that carol holds something of them, and nothing of their adapter.
    assert left == [f"derived/{user_hash('ada')}/{user_hash('carol')}/0000000001"]


def test_what_a_deletion_taints_is_listed_before_and_after(family, cohort, make_adapter):
    carol = Derived("carol", 1, "ada", 2)
    assert family.tainted("ada") == [carol]
    assert family.delete("ada").tainted == (carol,)
    assert family.tainted("ada") == [carol]
    assert family.tainted("carol") == [Derived("dave", 1, "carol", 1)]
    # carol's next revision was derived from nobody, and the tainted one can be pruned away.
    family.commit(cohort, "carol", make_adapter(20))
    assert family.prune("carol", before=2) == [1]
    assert family.tainted("ada") == []
    assert family.tainted("erin") == []


def test_a_user_who_comes_back_begins_anew(family, cohort, make_adapter, same):
    family.delete("ada")
    assert family.commit(cohort, "ada", make_adapter(30)).name == "ada@1"
    same(family.load("ada")[0], make_adapter(30))
    assert family.verify().clean


def test_pruning_keeps_the_numbers_and_what_is_named(family, make_adapter, same):
    family.tag("ada", "kept", 2)
    with pytest.raises(CatalogError, match="revision 2 is tagged 'kept'"):
        family.prune("ada", before=3)
    with pytest.raises(CatalogError, match="revision 1 is the latest"):
        family.prune("bob", before=2)
    assert family.prune("ada", before=2) == [1]
    assert family.prune("ada", before=2) == []
    assert [manifest.revision for manifest in family.history("ada")] == [2, 3]
    with pytest.raises(RevisionNotFoundError, match="revisions 2 to 3, there is no revision 1"):
        family.load("ada", 1)
    same(family.load("ada", 2)[0], make_adapter(1))
    audit = family.verify()
    assert audit.clean
    assert (audit.orphan_rows, audit.orphan_records) == (0, 0)


def test_nothing_is_derived_from_what_is_not_there(family, cohort, make_adapter):
    for parent in (("eve", 1), ("ada", 4)):
        with pytest.raises(RevisionNotFoundError, match="cannot derive from"):
            family.commit(cohort, "frank", make_adapter(), derived_from=[parent])
    assert not family.exists("frank")
    assert [name for name, _, _ in family.load("carol")[1].derived_from] == ["ada", "bob"]
