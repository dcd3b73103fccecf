"""The embedding table looked up where it lies, cut along its rows and its columns, on the installed jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from popax.modeling.layers import TABLE_AXES
from popax.modeling.model import Model
from popax.sharding import ShardingRules, free_axes

AXES = ("population", "fsdp", "tensor")


@pytest.fixture(scope="module")
def users_mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), AXES)


@pytest.mark.parametrize("by_hand", [(), ("population",)], ids=["partitioned", "population by hand"])
def test_a_table_cut_both_ways_is_looked_up_where_it_lies(tiny, users_mesh, by_hand):
    """Under a shard_map over users, which leaves the table's axes to the partitioner, and without one."""
    model = Model(tiny.config, ShardingRules())
    tokens = jnp.arange(4 * 6, dtype=jnp.int32).reshape(4, 6) % tiny.config.vocab_size
    params = jax.device_put(tiny.params, model.shardings(users_mesh))
    assert params["embed"]["embedding"].sharding.spec == PartitionSpec("tensor", "fsdp")
    call = model.embed
    if by_hand:
        users = PartitionSpec("population")
        specs = {"in_specs": (PartitionSpec(), users), "out_specs": users, "axis_names": set(by_hand)}
        call = jax.shard_map(call, mesh=users_mesh, check_vma=False, **specs)
    with jax.set_mesh(users_mesh):
        lookup = jax.jit(call).lower(params, tokens).compile()
        found = lookup(params, tokens)
    np.testing.assert_array_equal(found, np.asarray(tiny.params["embed"]["embedding"])[np.asarray(tokens)])
    assert found.sharding.spec[-1] == "fsdp"


def test_free_axes_are_those_that_nobody_has_cut(users_mesh):
    rules, free = ShardingRules(), []
    assert free_axes(TABLE_AXES, rules) == ()
    with jax.set_mesh(users_mesh):
        assert free_axes(TABLE_AXES, rules) == ("fsdp",)
        assert free_axes(("population",), rules) == ("population",)

        def inside(x):
            free.extend([free_axes(("population",), rules), free_axes(TABLE_AXES, rules)])
            return x

        specs = {"in_specs": PartitionSpec("population"), "out_specs": PartitionSpec("population")}
        jax.eval_shape(jax.shard_map(inside, axis_names={"population"}, check_vma=False, **specs), jnp.ones(2))
    assert free == [(), ("fsdp",)]
