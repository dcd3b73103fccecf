"""Slices, meshes and numbers of a plan: what is refused, and whether the message carries the values and the fix."""

import pytest

from popax.errors import ConfigError
from popax.plan.config import MeshShape, PlanConfig
from popax.plan.topology import CHIPS, parse_topology
from popax.sharding import DEFAULT_RULES


@pytest.mark.parametrize(
    ("name", "chips", "devices"),
    [("v5e:2x2", 4, 4), ("v5e:4x8", 32, 32), ("v4:2x2x1", 4, 8), ("v5p:4x4x8", 128, 128), ("tpu7x:2x2x2", 8, 16)],
)
def test_a_slice_by_name(name, chips, devices):
    slice_ = parse_topology(name)
    assert (slice_.chips, slice_.devices) == (chips, devices)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "the kinds are v4, v5e, v5p, v6e, tpu7x"),
        ("h100:8", "GPUs need a GPU"),
        ("v5e", "v5e has 2 dimensions, as in v5e:4x4"),
        ("v5e:2x2x2", "v5e has 2 dimensions"),
        ("v5p:4x4", "v5p has 3 dimensions, as in v5p:4x4x8"),
        ("v5e:3x3", "the first two sizes are even"),
        ("v5e:axb", "v5e has 2 dimensions"),
    ],
)
def test_a_slice_that_does_not_exist(name, message):
    with pytest.raises(ConfigError, match=message):
        parse_topology(name)


def test_what_the_compiler_allows_is_less_than_the_vendors_figure():
    """v5p's 95 GB are 95.74 GiB to the compiler."""
    for kind, chip in CHIPS.items():
        assert 0.9 < chip.usable_bytes / chip.hbm_bytes < 1.01, kind


def test_the_product_of_the_axes_is_the_slice():
    with pytest.raises(ConfigError, match=r"mesh \(fsdp 8\) has 8 devices, v5e:2x2 has 4.*product of its axes 4"):
        PlanConfig(topology="v5e:2x2", mesh=MeshShape(fsdp=8))
    with pytest.raises(ConfigError, match=r"v4:2x2x1 has 8 \(4 chips of 2\)"):
        PlanConfig(topology="v4:2x2x1", mesh=MeshShape(fsdp=4))
    with pytest.raises(ConfigError, match="serving_mesh"):
        PlanConfig(topology="v5e:2x2", mesh=MeshShape(fsdp=4), serving_mesh=MeshShape(tensor=2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"users": 6}, "users=6 does not divide over population x fsdp x expert = 4 devices: take 4"),
        ({"users": 2}, "take 4"),
        ({"slots": 3}, "slots=3 does not divide over population = 2"),
        ({"decode_rows": 5}, "decode_rows=5 does not divide over population = 2"),
        ({"users": 0}, "users=0: a whole number of at least 1"),
        ({"steps": ("train", "serve")}, "one or more of train, prefill, decode"),
        ({"prefill_tokens": 4096}, "prefill_tokens=4096 do not fit cache_length=2048"),
        ({"users_over": ("fsdp",)}, "users_over=.*'population', and others of"),
        ({"rows_over": ("population", "x")}, "rows_over"),
        ({"rules": (("heads", "tensor"), ("nothing", "tensor"))}, "rules name .'nothing'"),
    ],
)
def test_numbers_that_do_not_fit(fields, message):
    with pytest.raises(ConfigError, match=message):
        PlanConfig(topology="v5e:2x2", mesh=MeshShape(population=2, fsdp=2), **fields)


def test_without_a_mesh_the_slice_is_one_fsdp_axis():
    assert PlanConfig(topology="v5e:4x4").mesh == MeshShape(fsdp=16)


def test_only_the_planned_steps_are_checked():
    PlanConfig(topology="v5e:2x2", mesh=MeshShape(fsdp=4), steps=("decode",), users=3)
    PlanConfig(topology="v5e:2x2", mesh=MeshShape(population=4), steps=("train",), slots=3)


def test_rules_are_the_tables_with_the_plans_changes():
    config = PlanConfig(topology="v5e:2x2", mesh=MeshShape(fsdp=4), rules=(("vocab", ("tensor", "fsdp")),))
    train, serve = (dict(config.sharding_rules(step).rules) for step in ("train", "decode"))
    assert train["vocab"] == ("tensor", "fsdp")
    assert train["population"] == ("population", "fsdp", "expert")
    assert serve["population"] == "population"
    assert serve["batch"] == ("population",)
    changed = {name for name, axes in DEFAULT_RULES if train[name] != axes}
    assert changed == {"vocab", "population"}
