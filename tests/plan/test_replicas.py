"""More replicas of the population: which plan that is, and what counts as growth."""

import dataclasses

import pytest

from popax.adapters.base import AdapterConfig
from popax.errors import ConfigError
from popax.plan.compiler import Compiled
from popax.plan.config import MeshShape, PlanConfig
from popax.plan.replicas import growth, replicated
from popax.plan.topology import parse_topology

PLAN = PlanConfig(
    topology="v5e:2x2",
    mesh=MeshShape(population=2, fsdp=2),
    serving_mesh=MeshShape(tensor=4),
    adapter=AdapterConfig(rank=8),
    users=8,
    slots=4,
    decode_rows=8,
    prefill_rows=4,
)


@pytest.mark.parametrize(
    ("name", "times", "larger"),
    [
        ("v5e:2x2", 1, "v5e:2x2"),
        ("v5e:2x2", 2, "v5e:2x4"),
        ("v5e:2x2", 4, "v5e:4x4"),
        ("v5p:4x4x2", 2, "v5p:4x4x4"),
        ("v5p:2x2x2", 4, "v5p:2x4x4"),
    ],
)
def test_a_larger_slice_doubles_its_shortest_sides(name, times, larger):
    found = parse_topology(name).larger(times)
    assert found == parse_topology(larger)
    assert found.chips == times * parse_topology(name).chips


@pytest.mark.parametrize("times", [0, -2, 3, 6])
def test_sides_double(times):
    with pytest.raises(ConfigError, match=f"{times} times as large: sides double, so take a power of two"):
        replicated(PLAN, "train", times)


def test_a_replica_keeps_its_users_slots_and_rows():
    four = replicated(PLAN, "decode", 4)
    assert (four.topology, four.steps) == ("v5e:4x4", ("decode",))
    assert (four.mesh, four.serving_mesh) == (MeshShape(population=8, fsdp=2), MeshShape(population=4, tensor=4))
    assert (four.users, four.slots, four.decode_rows, four.prefill_rows) == (32, 16, 32, 16)


def test_growth_is_the_largest_difference():
    one = Compiled(
        step="train", fits=True, needed_bytes=1000, argument_bytes={}, temporary_bytes=0, matmul_flops=1000,
        recomputed_flops=0, hbm_bytes=1000, accessed_bytes=1000, collectives=[], compile_s=1.0, cpu_s=1.0, peak_bytes=1,
        refusal="",
    )  # fmt: skip
    assert growth(one, [one, one]) == 0
    assert growth(one, [one._replace(needed_bytes=1010), one._replace(accessed_bytes=960)]) == 0.04
    assert growth(one, [one._replace(matmul_flops=1500)]) == 0.5
    # What the compiler keeps in VMEM is its own affair.
    assert growth(one, [one._replace(hbm_bytes=960)]) == 0
    assert growth(one, [one._replace(fits=False)]) == float("inf")


def test_slices_follow_each_other_along_the_population():
    both = PlanConfig(topology="v5e:2x2", slices=2)
    assert (both.mesh, both.where) == (MeshShape(population=2, fsdp=4), "2 slices of v5e:2x2")
    assert both.slice.devices == 8
    assert both.mesh.of_one(2) == MeshShape(fsdp=4)
    with pytest.raises(ConfigError, match=r"population axis does not divide over 2 slices.*take a multiple of 2"):
        dataclasses.replace(both, mesh=MeshShape(fsdp=8))
    with pytest.raises(ConfigError, match="0 slices of v5e:2x2: a whole number of at least 1"):
        PlanConfig(topology="v5e:2x2", slices=0)
