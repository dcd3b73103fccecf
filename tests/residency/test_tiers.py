"""The host tier and the slot table, each against the plainest model of what it should do."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popax.errors import PopulationError
from popax.residency.lru import HostTier
from popax.residency.request import Key
from popax.residency.table import SlotTable

KEYS = [Key(f"u{index}", 1, "d") for index in range(12)]
OPERATIONS = st.lists(st.tuples(st.sampled_from(["get", "pin", "unpin"]), st.sampled_from(KEYS)), max_size=80)


@given(OPERATIONS, st.integers(0, 6))
def test_the_host_tier_is_an_lru_of_what_is_not_pinned(operations, capacity):
    tier, model, pins = HostTier(capacity * 10), collections.OrderedDict(), collections.Counter()
    hits = 0

    def shrink():
        while len(model) > capacity and (free := [key for key in model if not pins[key]]):
            del model[free[0]]

    for what, key in operations:
        if what == "get":
            found = tier.get(key)
            assert (found is not None) == (key in model)
            if found is None:
                tier.put(key, np.zeros(10, np.uint8))
                model[key] = None
            else:
                hits += 1
            model.move_to_end(key)
            shrink()
        elif what == "pin" and key in model:
            tier.pin(key)
            pins[key] += 1
        elif what == "unpin" and pins[key]:
            tier.unpin(key)
            pins[key] -= 1
            shrink()
        assert {key for key in KEYS if key in tier} == set(model)
        assert tier.bytes == 10 * len(model)
        assert tier.counters.hits == hits


@settings(max_examples=60)
@given(st.lists(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3, unique=True), max_size=40))
def test_slots_are_an_lru_and_never_shared(leases):
    table, order = SlotTable(4), collections.OrderedDict()
    for keys in leases:
        assert table.fits(set(keys))
        missing = table.pin(keys)
        assert set(missing) == {key for key in keys if key not in order}
        for key in [key for key in keys if key in order]:
            order.move_to_end(key)
        for key in keys:
            if key not in order:
                if len(order) == 4:
                    del order[next(one for one in order if one not in keys)]
                order[key] = None
        assert {key for key in KEYS if key in table} == set(order)
        slots = [table.slot(key) for key in order]
        assert len(set(slots)) == len(slots)
        assert set(slots) <= set(range(4))
        table.unpin(keys)
    assert table.available == 4


def test_held_slots_are_not_given_away():
    table = SlotTable(2)
    table.pin(KEYS[:2])
    assert not table.fits({KEYS[2]})
    assert table.fits({KEYS[0], KEYS[1]})
    table.unpin(KEYS[:1])
    assert table.pin([KEYS[2]]) == {KEYS[2]: 0}
    assert KEYS[0] not in table


def test_a_negative_budget_is_named():
    with pytest.raises(PopulationError, match="-1 bytes"):
        HostTier(-1)
