"""The embedding table looked up where it lies, cut along its rows and its columns, on the installed jax."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from popax import sharding
from popax.modeling.model import Model
from popax.sharding import ShardingRules

AXES = ("population", "fsdp", "tensor")
TABLE_AXES = ("vocab", "embed")
LOOKUP = """
import jax, numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model

model = Model(
    ModelConfig(vocab_size=64, embed_dim=16, ffw_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
)
mesh = Mesh(numpy.array(jax.devices()).reshape(2, 2, 2), ("population", "fsdp", "tensor"))
place = lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own)
params = jax.tree.map(place, model.abstract(), model.shardings(mesh))
users = PartitionSpec("population")
tokens = jax.ShapeDtypeStruct((4, 6), "int32", sharding=NamedSharding(mesh, users))
specs = {"in_specs": (PartitionSpec(), users), "out_specs": users, "axis_names": {"population"}}
with jax.set_mesh(mesh):
    jax.jit(jax.shard_map(model.embed, check_vma=False, **specs)).lower(params, tokens).compile()
"""


@pytest.fixture(scope="module")
def users_mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), AXES)


def test_the_compiler_survives_a_table_cut_both_ways():
    """In a process of its own: XLA ends the process where it meets a lookup that it cannot partition."""
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", LOOKUP], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]


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
    assert sharding.free_axes(TABLE_AXES, rules) == ()
    with jax.set_mesh(users_mesh):
        assert sharding.free_axes(TABLE_AXES, rules) == ("fsdp",)
        assert sharding.free_axes(("population",), rules) == ("population",)

        def inside(x):
            free.extend([sharding.free_axes(("population",), rules), sharding.free_axes(TABLE_AXES, rules)])
            return x

        specs = {"in_specs": PartitionSpec("population"), "out_specs": PartitionSpec("population")}
        jax.eval_shape(jax.shard_map(inside, axis_names={"population"}, check_vma=False, **specs), jnp.ones(2))
    assert free == [(), ("fsdp",)]
