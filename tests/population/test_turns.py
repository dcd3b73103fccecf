"""Members who take turns: where each sits, and that all of them together are one array in the seats' order."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from popax.population.optimizer import adamw
from popax.population.placement import Placement
from popax.population.state import empty_population
from popax.population.turns import Turns

SLOTS, TURNS = 4, 3


def test_a_turns_seats_are_those_of_its_slots_blocks():
    mesh = Mesh(np.array(jax.devices()[:2]), ("population",))
    turns = Turns(Placement(SLOTS, mesh), TURNS)
    assert [turns.seats_of(turn) for turn in range(TURNS)] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert Turns(Placement(SLOTS), TURNS).seats_of(1) == [4, 5, 6, 7]
    assert Turns(Placement(SLOTS)).seats_of(0) == [0, 1, 2, 3]


@pytest.mark.parametrize("axes", [None, {"population": 2, "tensor": 4}])
def test_together_is_by_seat_and_apart_is_its_inverse(bench, axes):
    mesh = None if axes is None else Mesh(np.array(jax.devices()).reshape(*axes.values()), tuple(axes))
    turns, cohort = Turns(Placement(SLOTS, mesh), TURNS), bench.cohort("lora")
    empty = empty_population(cohort, adamw(), SLOTS)
    shardings = turns.placement.shardings(cohort, empty)

    def state_of(turn: int):
        seats = np.asarray(turns.seats_of(turn))
        full = jax.tree.map(lambda leaf: np.broadcast_to(seats.reshape(-1, *[1] * (leaf.ndim - 1)), leaf.shape), empty)
        full = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), full, empty)
        return turns.to_host(jax.device_put(full, shardings) if mesh else jax.device_put(full))

    states = [state_of(turn) for turn in range(TURNS)]
    whole = turns.join_turns(states)
    for leaf in jax.tree.leaves(whole):
        assert leaf.shape[0] == SLOTS * TURNS
        assert leaf.sharding.memory_kind == "pinned_host"
        seats = np.arange(SLOTS * TURNS).reshape(-1, *[1] * (leaf.ndim - 1))
        np.testing.assert_array_equal(np.asarray(leaf), np.broadcast_to(seats, leaf.shape).astype(leaf.dtype))
    for state, again in zip(states, turns.split_turns(whole), strict=True):
        jax.tree.map(np.testing.assert_array_equal, state, again)
        entered = jax.tree.leaves(turns.to_device(again))
        assert {leaf.sharding.memory_kind for leaf in entered} == {jax.devices()[0].default_memory().kind}
