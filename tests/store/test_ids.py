"""User ids are hostile input: none becomes a path, none reaches another user's row."""

import numpy as np
import pytest
import tensorstore as ts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from popax.errors import CatalogError
from popax.store import Catalog, Commit, RowLayout
from popax.store.records import user_hash, user_key

HOSTILE = [
    "../../etc/passwd",
    "/",
    ".",
    "a\x00b",
    "a\x00",
    "a",
    "A",
    "\u0430",  # Cyrillic, looks like "a"
    "\u00e9",
    "e\u0301",  # the same letter, decomposed
    "x" * 10_000,
    "x" * 9_999,
    "user/1",
    "user@1",
    "%2e%2e%2f",
    "\U0001f600",
    "\n",
    " ",
]
ANY_TEXT = st.text(st.characters(), min_size=1, max_size=40)


def test_each_hostile_id_finds_its_own_row(catalog, config, specs, place):
    layout = RowLayout.of({"s": {"x": np.zeros(1, np.int32)}})
    cohort = catalog.cohort(config, specs, "base", layout)
    commits = [Commit(user, {"s": {"x": np.array([index], np.int32)}}) for index, user in enumerate(HOSTILE)]
    catalog.commit_batch(cohort, commits)
    for index, user in enumerate(HOSTILE):
        adapter, manifest = catalog.load(user)
        assert adapter["s"]["x"] == index
        assert manifest.user == user
    assert {record.user for record in catalog.list()} == set(HOSTILE)
    files = [path.relative_to(place) for path in place.rglob("*")]
    assert all(path.parts[0] in ("popax_catalog.json", "shard_00000", "locks") for path in files)
    assert all(len(path.name) < 60 for path in files)


@given(ANY_TEXT, ANY_TEXT)
def test_keys_are_short_safe_and_different(one, other):
    keys = {}
    for user in (one, other):
        if any(0xD800 <= ord(character) <= 0xDFFF for character in user):
            with pytest.raises(CatalogError, match=r"lone surrogate U\+D") as caught:
                user_key(user)
            assert str(caught.value).isascii()
        else:
            keys[user] = user_key(user)
    assert len(set(keys.values())) == len(keys)
    for key in keys.values():
        assert len(key) == 37
        assert set(key.removeprefix("user/")) <= set("0123456789abcdef")


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(users=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=6, unique=True))
def test_any_set_of_users_keeps_apart(users, config, specs):
    catalog = Catalog.open("memory://", create=True, context=ts.Context())
    cohort = catalog.cohort(config, specs, "base", RowLayout.of({"s": {"x": np.zeros(1, np.int32)}}))
    for index, user in enumerate(users):
        catalog.commit(cohort, user, {"s": {"x": np.array([index], np.int32)}})
    for index, (adapter, manifest) in enumerate(catalog.load_batch(users)):
        assert adapter["s"]["x"] == index
        assert manifest.name == f"{users[index]}@1"


@pytest.mark.parametrize("user", ["", "\ud800", "ok\udfff", None, 3, b"bytes"])
def test_what_is_no_id_is_refused_by_name(catalog, cohort, make_adapter, user):
    with pytest.raises(CatalogError, match="user id"):
        catalog.commit(cohort, user, make_adapter())
    with pytest.raises(CatalogError, match="user id"):
        catalog.load(user)


def test_a_long_id_does_not_flood_the_message(catalog):
    with pytest.raises(CatalogError) as caught:
        catalog.load("x" * 10_000)
    assert len(str(caught.value)) < 500
    assert len(user_hash("x" * 10_000)) == 32
