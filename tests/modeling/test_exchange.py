"""Weights that are read in rows and exchanged lie as if every device had read what it wants."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from popax.modeling.exchange import _filled, plan_exchange

P = PartitionSpec
SHAPE = (2, 8, 16)  # layers, columns as stored, rows as stored


def like(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32)


def mesh_of(**sizes: int) -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(tuple(sizes.values())), tuple(sizes))


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    ("sizes", "wanted", "read"),
    [
        ({"fsdp": 8}, P(None, "fsdp"), P(None, None, "fsdp")),
        ({"fsdp": 4, "tensor": 2}, P(None, "fsdp", "tensor"), P(None, None, ("tensor", "fsdp"))),
        ({"population": 2, "fsdp": 4}, P(None, "fsdp"), P(None, None, ("fsdp", "population"))),
        ({"population": 4, "tensor": 2}, P(None, None, "tensor"), P(None, None, ("tensor", "population"))),
        ({"fsdp": 2, "expert": 4}, P(None, ("fsdp", "expert")), P(None, None, ("fsdp", "expert"))),
        ({"population": 8}, P(), P(None, None, "population")),
        ({"population": 2, "tensor": 4}, P(None, "tensor", None), P(None, None, ("tensor", "population"))),
        ({"expert": 2, "fsdp": 4}, P("expert", "fsdp"), P("expert", None, "fsdp")),
    ],
)
def test_what_is_exchanged_lies_as_it_is_wanted(sizes, wanted, read, transposed):
    mesh = mesh_of(**sizes)
    turn = (lambda x: x) if transposed else (lambda x: np.ascontiguousarray(x.transpose(0, 2, 1)))
    specs = [P(*(*spec, *(None,) * (3 - len(spec)))) for spec in (wanted, read)]
    if not transposed:
        specs = [P(spec[0], spec[2], spec[1]) for spec in specs]
    values = turn(np.arange(256, dtype=np.float32).reshape(SHAPE))
    plan = plan_exchange(values, NamedSharding(mesh, specs[0]), stacked=1, transposed=transposed)
    assert plan is not None
    assert plan.read.is_equivalent_to(NamedSharding(mesh, specs[1]), 3)
    assert plan.read.shard_shape(values.shape)[plan.column] == values.shape[plan.column], "columns are not cut"
    assert np.prod(plan.read.shard_shape(values.shape)) == values.size // 8, "every device reads an equal share"
    parts = []
    found = plan(lambda index: parts.append(values[index]) or parts[-1])
    assert sum(part.nbytes for part in parts) == values.nbytes, "everything is read once"
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, specs[0]), 3)
    np.testing.assert_array_equal(found, values)


def test_what_is_wanted_in_rows_or_does_not_divide_is_read_as_it_is_wanted():
    mesh = mesh_of(fsdp=4, tensor=2)
    rows = NamedSharding(mesh, P(None, None, ("tensor", "fsdp")))
    assert plan_exchange(like(SHAPE), rows, stacked=1, transposed=True) is None
    columns = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    assert plan_exchange(like((2, 8, 12)), columns, stacked=1, transposed=True) is None
    assert plan_exchange(like((2, 8)), NamedSharding(mesh, P()), stacked=1, transposed=False) is None
    # Rows that divide by what is swapped, and not by what is replicated, are swapped.
    mesh = mesh_of(population=4, fsdp=2)
    plan = plan_exchange(like((2, 8, 6)), NamedSharding(mesh, P(None, "fsdp")), stacked=1, transposed=True)
    assert plan is not None
    assert (plan.swapped, plan.gathered) == (("fsdp",), ())


def test_only_what_is_swapped_crosses_between_devices():
    """An all-to-all of shares and nothing else: no device ever has a parameter that it does not keep."""
    mesh = mesh_of(fsdp=4, tensor=2)
    plan = plan_exchange(like(SHAPE), NamedSharding(mesh, P(None, "fsdp", "tensor")), stacked=1, transposed=True)
    assert plan is not None
    array = jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=plan.wanted)
    slab = jax.ShapeDtypeStruct((1, *SHAPE[1:]), np.float32, sharding=plan.read)
    compiled = _filled.lower(plan, array, slab, np.int32(0)).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory.alias_size_in_bytes == memory.output_size_in_bytes, "the array is filled in place"
    assert "all-to-all" in text
    assert not any(other in text for other in ("all-gather", "all-reduce", "collective-permute"))
