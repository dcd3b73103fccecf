"""A flipped bit anywhere is detected at load, and the message names the user and the revision."""

import random
import re

import numpy as np
import pytest

from popax.errors import CatalogError, CorruptRevisionError
from popax.store import Catalog
from popax.store.database import Database
from popax.store.records import BrokenRecordError, manifest_key, row_key, seal, unseal, user_key
from popax.store.tree import Leaf, walk


@pytest.fixture
def database(catalog, cohort, make_adapter, place):
    for seed in range(3):
        catalog.commit(cohort, "ada", make_adapter(seed), metrics={"loss": 1.25}, run="r")
        catalog.commit(cohort, "bob", make_adapter(seed + 10))
    return Database.open(place, create=False)


def _flip(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_every_flipped_bit_of_a_row_is_seen(database, cohort, place, same, make_adapter):
    row = Catalog.open(place).load("ada", 2)[1].row
    key = row_key(cohort.id, row)
    good = database.kvstore.read(key).result().value
    rng = random.Random(0)
    for _ in range(30):
        database.kvstore.write(key, _flip(good, rng.randrange(len(good) * 8))).result()
        with pytest.raises(CorruptRevisionError, match="'ada'@2"):
            Catalog.open(place).load("ada", 2)
    same(Catalog.open(place).load("ada", 3)[0], make_adapter(2))
    database.kvstore.write(key, None).result()
    with pytest.raises(CorruptRevisionError, match="'ada'@2"):
        Catalog.open(place).load("ada", 2)


def test_the_broken_row_of_a_batch_is_named(database, cohort, place):
    row = Catalog.open(place).load("bob")[1].row
    database.kvstore.write(row_key(cohort.id, row), b"short").result()
    with pytest.raises(CorruptRevisionError, match="'bob'@3"):
        Catalog.open(place).load_batch(["ada", "bob"])


@pytest.mark.parametrize(("key", "named"), [(manifest_key("ada", 2), "'ada'@2"), (user_key("ada"), "user 'ada'")])
def test_every_flipped_bit_of_a_record_is_seen(database, place, key, named):
    good = database.kvstore.read(key).result().value
    rng = random.Random(0)
    for _ in range(30):
        database.kvstore.write(key, _flip(good, rng.randrange(len(good) * 8))).result()
        with pytest.raises(CorruptRevisionError, match=named):
            Catalog.open(place).load("ada", 2)


def test_records_under_another_users_key_are_refused(database, place):
    copied = database.kvstore.read(manifest_key("bob", 2)).result().value
    database.kvstore.write(manifest_key("ada", 2), copied).result()
    with pytest.raises(CorruptRevisionError, match=r"'ada'@2.*'bob'@2"):
        Catalog.open(place).load("ada", 2)
    database.kvstore.write(user_key("ada"), database.kvstore.read(user_key("bob")).result().value).result()
    with pytest.raises(CorruptRevisionError, match="user 'ada'"):
        Catalog.open(place).load("ada")


def test_a_lost_manifest_is_named(database, place):
    database.kvstore.write(manifest_key("ada", 2), None).result()
    with pytest.raises(CorruptRevisionError, match="'ada'@2"):
        Catalog.open(place).load("ada", 2)


def test_two_hundred_flips_in_the_files_are_two_hundred_detections(database, cohort, place, same, make_adapter):
    """One bit anywhere in a row, in a record or in a node that leads to them; and what loads is never wrong."""
    rng, base = random.Random(1), database.base(0)
    seeds = {"ada": 0, "bob": 10}
    reached = [piece for node in walk(base) for piece in (node.place, *_values(node)) if piece.file[0] != "h"]
    rows = 0
    for _ in range(200):
        piece = rng.choice(reached)
        path = place / "shard_00000" / piece.file
        good = path.read_bytes()
        path.write_bytes(_flip(good, piece.start * 8 + rng.randrange(piece.bytes * 8)))
        failed = []
        for user, revision in ((user, revision) for user in seeds for revision in (1, 2, 3)):
            try:
                same(Catalog.open(place).load(user, revision)[0], make_adapter(seeds[user] + revision - 1))
            except CatalogError as error:
                failed.append(str(error))
        assert failed or _audit_finds_something(place), piece
        path.write_bytes(good)
        if piece.bytes == cohort.layout.row_bytes:
            # A row: its own revision fails and no other, and the message says which.
            rows += 1
            assert len(failed) == 1
            assert re.search(r"'(ada|bob)'@[123]", failed[0])
    assert rows > 20


def _values(node):
    return [piece for _, piece in node.values] if isinstance(node, Leaf) else []


def _audit_finds_something(place):
    """Whether an audit of all that is there finds something, or cannot be made."""
    try:
        return not Catalog.open(place).verify().clean
    except CatalogError:
        return True


def test_sealing():
    record = {"a": [1, 2.5, "é", None], "b": {"c": True}}
    sealed = seal(record)
    assert unseal(sealed) == record
    for bit in range(len(sealed) * 8):
        with pytest.raises(BrokenRecordError):
            unseal(_flip(sealed, bit))
    assert unseal(seal({"x": np.float32(0.5), "y": np.arange(2)})) == {"x": 0.5, "y": [0, 1]}
