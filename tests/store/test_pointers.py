"""A user's pointers: each change is one atomic step, and names what cannot be."""

import pytest

from popax.errors import CatalogError, ConflictError, RevisionNotFoundError
from popax.store import Catalog
from popax.store.manifest import PROMOTIONS


@pytest.fixture
def ada(catalog, cohort, make_adapter):
    """A catalog with five revisions of ada."""
    for seed in range(5):
        catalog.commit(cohort, "ada", make_adapter(seed))
    return catalog


def test_serving_follows_what_was_promoted_and_rollback_is_one_pointer(ada, make_adapter, same, place):
    with pytest.raises(RevisionNotFoundError, match="'ada' has no promoted revision"):
        ada.load("ada", "promoted")
    for revision in (2, 4):
        assert ada.promote("ada", revision).promoted == revision
        same(ada.load("ada", "promoted")[0], make_adapter(revision - 1))
    assert ada.rollback("ada").promoted == 2
    same(Catalog.open(place).load("ada", "promoted")[0], make_adapter(1))
    same(ada.load("ada")[0], make_adapter(4))
    with pytest.raises(RevisionNotFoundError, match=r"no earlier promotion.*\[2\]"):
        ada.rollback("ada")


def test_rollback_goes_only_where_promotion_was(ada):
    for revision in (1, 3, 5):
        ada.promote("ada", revision)
    with pytest.raises(RevisionNotFoundError, match="revision 2 was not promoted before 5"):
        ada.rollback("ada", 2)
    assert ada.rollback("ada", 1).promotions == (1,)


def test_promotions_are_remembered_up_to_a_number_and_repeats_change_nothing(ada):
    for at in range(20):
        record = ada.promote("ada", 1 + at % 5)
    assert record.promotions == tuple(1 + at % 5 for at in range(20))[-PROMOTIONS:]
    assert ada.promote("ada", 5) == record


def test_a_promotion_decided_on_an_older_revision_is_refused(ada, cohort, make_adapter):
    assert ada.promote("ada", expected=5).promoted == 5
    ada.commit(cohort, "ada", make_adapter(9))
    with pytest.raises(ConflictError, match="revision 6 was committed since 5"):
        ada.promote("ada", 6, expected=5)
    assert ada.load("ada", "promoted")[1].revision == 5


def test_tags_name_revisions_and_move(ada, make_adapter, same):
    ada.tag("ada", "good", 2)
    ada.tag("ada", "v1.0-rc_1")
    same(ada.load("ada", "good")[0], make_adapter(1))
    assert ada.tag("ada", "good", "v1.0-rc_1").tags == {"good": 5, "v1.0-rc_1": 5}
    assert ada.untag("ada", "good").tags == {"v1.0-rc_1": 5}
    with pytest.raises(RevisionNotFoundError, match=r"no tag 'good'; its tags: 'v1.0-rc_1'"):
        ada.load("ada", "good")
    with pytest.raises(RevisionNotFoundError, match="no tag 'good'"):
        ada.untag("ada", "good")


@pytest.mark.parametrize("name", ["latest", "promoted", "base", "candidate", "7", "", "a b", "a/b", "x" * 65, "ä"])
def test_names_that_could_be_mistaken_are_no_tags(ada, name):
    with pytest.raises(CatalogError, match="1 to 64 letters"):
        ada.tag("ada", name)
    assert ada.records(["ada"])[0].tags == {}


def test_pointers_survive_new_revisions_and_unknown_users_are_named(ada, cohort, make_adapter):
    ada.promote("ada", 3)
    ada.tag("ada", "kept", 1)
    ada.commit(cohort, "ada", make_adapter(7))
    [record] = ada.records(["ada"])
    assert (record.latest, record.promoted, record.tags) == (6, 3, {"kept": 1})
    for change in (ada.promote, ada.rollback, lambda user: ada.tag(user, "x")):
        with pytest.raises(RevisionNotFoundError, match="'eve' has no revision"):
            change("eve")
    with pytest.raises(RevisionNotFoundError, match="no revision 9"):
        ada.promote("ada", 9)


def test_a_read_only_catalog_moves_nothing(ada, place):
    reader = Catalog.open(place, read_only=True)
    for change in (reader.promote, reader.rollback, reader.delete, lambda user: reader.tag(user, "x")):
        with pytest.raises(CatalogError, match="read-only"):
            change("ada")
