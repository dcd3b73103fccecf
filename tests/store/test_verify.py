"""`verify` reads everything, names what is wrong, and calls nothing wrong that is not."""

import numpy as np
import pytest

from popax.store import Catalog, Commit
from popax.store.database import Database
from popax.store.packed import seal_user, unseal_user
from popax.store.records import derived_key, manifest_key, row_key, seal, user_key

USERS = [f"user-{index}" for index in range(40)]


@pytest.fixture
def full(catalog, cohort, make_adapter):
    """40 users of two revisions each, and one derived from two of them."""
    for turn in range(2):
        catalog.commit_batch(cohort, [Commit(user, make_adapter(turn * 100 + at)) for at, user in enumerate(USERS)])
    catalog.commit(cohort, "merged", make_adapter(7), derived_from=[("user-1", 1), ("user-2", 2)])
    return catalog


@pytest.fixture
def store(full, place):
    return Database.open(place, create=False).kvstore


def test_a_whole_catalog_is_clean_and_counted(full, cohort):
    seen = []
    audit = full.verify(progress=seen.append)
    assert audit.clean
    assert (audit.users, audit.revisions, audit.rows) == (41, 81, 81)
    assert audit.row_bytes == 81 * cohort.layout.row_bytes
    assert (audit.orphan_rows, audit.orphan_records, audit.problems) == (0, 0, ())
    assert seen[-1] == 41
    assert full.verify(["user-3", "merged"]).revisions == 3


def _record(user, **changed):
    """What the store does to a user's record."""
    return lambda store: store.write(
        user_key(user), seal_user({**unseal_user(store.read(user_key(user)).result().value), **changed})
    ).result()


def _flip(key):
    def flip(store):
        data = bytearray(store.read(key).result().value)
        data[-1] ^= 1
        store.write(key, bytes(data)).result()

    return flip


def _copy(source, target):
    return lambda store: store.write(target, store.read(source).result().value).result()


DAMAGE = {
    "a superseded manifest's bit": (_flip(manifest_key("user-5", 1)), "user-5", 1),
    "a superseded manifest lost": (lambda store: store.write(manifest_key("user-5", 1), None).result(), "user-5", 1),
    "another user's manifest": (_copy(manifest_key("user-6", 1), manifest_key("user-5", 1)), "user-5", 1),
    "a record's bit": (_flip(user_key("user-5")), user_key("user-5"), None),
    "another user's record": (_copy(user_key("user-6"), user_key("user-5")), user_key("user-5"), None),
    "a promotion of what is not there": (_record("user-5", promotions=[3]), "user-5", 3),
    "a tag of what is not there": (_record("user-5", tags={"x": 9}), "user-5", 9),
    "no range": (_record("user-5", oldest=3), "user-5", None),
    "an index lost": (
        lambda store: store.write(derived_key("user-1", "merged", 1), None).result(),
        "merged",
        1,
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_each_damage_is_found_and_named(full, store, place, damage):
    harm, user, revision = DAMAGE[damage]
    harm(store)
    audit = Catalog.open(place).verify()
    assert not audit.clean
    assert (user, revision) in [(problem.user, problem.revision) for problem in audit.problems]
    assert audit.users >= 40


def test_damaged_rows_are_named_and_all_of_them(full, store, cohort, place):
    names = {}
    for user in USERS[:7]:
        manifest = full.load(user, 2)[1]
        _flip(row_key(cohort.id, manifest.row))(store)
        names[user] = 2
    audit = Catalog.open(place).verify()
    assert {problem.user: problem.revision for problem in audit.problems} == names
    assert audit.problem_count == 7
    assert audit.rows == 81 - 7


def test_two_revisions_that_share_a_row_are_found(full, store, place):
    [record] = full.records(["user-9"])
    other = full.load("user-8")[1]
    _record("user-9", manifest={**record.current, "row": other.row, "digest": other.digest})(store)
    audit = Catalog.open(place).verify()
    assert "is another revision's too" in " ".join(problem.what for problem in audit.problems)
    assert audit.orphan_rows == 1


def test_what_no_record_leads_to_is_an_orphan_and_no_problem(full, store, cohort, place, make_adapter):
    full.stage_batch(cohort, [Commit("staged", make_adapter(1)), Commit("too", make_adapter(2))], shard=0)
    store.write(manifest_key("nobody", 1), seal({"user": "nobody"})).result()
    store.write(derived_key("user-1", "nobody", 1), seal({})).result()
    audit = Catalog.open(place).verify()
    assert audit.clean
    assert (audit.orphan_rows, audit.orphan_records) == (2, 2)


def test_a_million_bits_are_not_needed_for_sparse_rows(full, cohort):
    """The census grows with the highest row, not with the number of revisions."""
    from popax.store.audit_rows import RowCensus

    census = RowCensus(full._database)
    manifest = full.load("user-0")[1]
    assert census.name(manifest)
    assert not census.name(manifest)
    assert sum(len(bits) for bits in census._named.values()) <= 1024
    assert sorted(row for _, _, row in census.unnamed()) == sorted(set(range(81)) - {manifest.row})
    assert np.sum([bits.sum() for bits in census._named.values()]) == 1
