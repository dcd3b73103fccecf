"""Seats are a pure function of who was admitted and released."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popax.errors import PopulationError
from popax.population.slots import SlotTable


def test_seats_are_filled_in_order_and_stay():
    table, seated = SlotTable.empty(2).admit(["a", "b", "c"])
    assert seated == [(0, "a"), (1, "b")]
    table, seated = table.release([0]).admit(["a", "b", "c"])
    assert seated == [(0, "c")]
    assert table.users == ("c", "b")
    assert table.release([0, 1]).admit(["a", "b", "c"])[1] == []


def test_no_slots_is_an_error():
    with pytest.raises(PopulationError, match="slots=0"):
        SlotTable.empty(0)


@given(st.integers(1, 5), st.integers(0, 20), st.data())
def test_everyone_is_seated_exactly_once(slots, users, data):
    queue = [f"u{index}" for index in range(users)]
    table, seated = SlotTable.empty(slots).admit(queue)
    met = [user for _, user in seated]
    while table.occupied:
        gone = data.draw(st.lists(st.sampled_from(table.occupied), min_size=1, unique=True))
        table, seated = table.release(gone).admit(queue)
        met += [user for _, user in seated]
    assert met == queue
