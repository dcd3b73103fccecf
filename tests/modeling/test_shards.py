"""A shard put together strip by strip equals the slice of the whole, whatever the strips, and stands in memory once."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from popax.bench.weight_files import write_random_weights
from popax.errors import CheckpointError
from popax.modeling import hf, shards
from popax.modeling.shards import Source, aligned_empty, read_shard, read_shards
from popax.modeling.tensor_files import StoredTensor
from popax.trees import flatten_named

L, D_IN, D_OUT = 3, 13, 37


class InMemory:
    """Slices of an array, as a checkpoint would have them."""

    stored: tuple[StoredTensor, ...] = ()

    def __init__(self, values: np.ndarray):
        self.values, self.shape = values, values.shape

    def read(self, index):
        return self.values[index]


@pytest.fixture
def small_strips(monkeypatch):
    monkeypatch.setattr(shards, "STRIP_ROWS", 5)
    monkeypatch.setattr(shards, "STRIP_ELEMENTS", 7)
    monkeypatch.setattr(shards, "TILE_COLUMNS", 4)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(3) as pool:
        yield pool


def kernels(seed: int = 0) -> tuple[Source, np.ndarray]:
    """(a stack of kernels stored as [d_out, d_in], the parameter [L, d_in, d_out] that it means)."""
    stored = np.random.default_rng(seed).normal(size=(L, D_OUT, D_IN)).astype(np.float32)
    return Source([InMemory(one) for one in stored], 1, True), stored.transpose(0, 2, 1)


@pytest.mark.parametrize(
    "index",
    [
        (slice(None), slice(None), slice(None)),
        (slice(1, 3), slice(4, 11), slice(0, 37)),
        (slice(0, 2), slice(None), slice(9, 23)),
        (slice(2, 3), slice(12, 13), slice(36, 37)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_slice_of_kernels_and_of_vectors(small_strips, pool, index, dtype):
    source, whole = kernels()
    dtype = jnp.dtype(dtype)
    np.testing.assert_array_equal(read_shard(source, whole.shape, dtype, pool, index), whole[index].astype(dtype))
    vectors = np.ascontiguousarray(whole[:, 0])
    source = Source([InMemory(one) for one in vectors], 1, False)
    np.testing.assert_array_equal(
        read_shard(source, vectors.shape, dtype, pool, index[::2]), vectors[index[::2]].astype(dtype)
    )


def test_experts_are_a_second_axis_of_tensors(small_strips, pool):
    stored = np.random.default_rng(1).normal(size=(2, 4, 6, 9)).astype(np.float32)
    source = Source([InMemory(one) for layer in stored for one in layer], 2, True)
    index = (slice(0, 2), slice(1, 3), slice(2, 9), slice(0, 6))
    found = read_shard(source, (2, 4, 9, 6), np.dtype("float32"), pool, index)
    np.testing.assert_array_equal(found, stored.transpose(0, 1, 3, 2)[index])


def test_a_buffer_is_taken_by_a_cpu_device_as_it_is():
    for shape in ((3,), (7, 5), (2, 64, 65)):
        buffer = aligned_empty(shape, np.dtype("float32"))
        buffer[...] = 1.0
        assert jax.device_put(buffer).unsafe_buffer_pointer() == buffer.ctypes.data


def test_a_shard_that_several_devices_have_is_read_once(mesh, pool):
    source, whole = kernels()
    indices = []

    def read(index):
        indices.append(index)
        return read_shard(source, whole.shape, np.dtype("float32"), pool, index)

    sharding = NamedSharding(mesh, PartitionSpec())  # of eight devices
    devices = list(mesh.devices.flat)
    found = read_shards(read, whole.shape, sharding, devices)
    assert list(found) == devices
    assert len(indices) == 1
    for array in found.values():
        np.testing.assert_array_equal(array, whole)


def test_the_shards_of_some_devices_are_those_of_the_whole(tiny, tmp_path, mesh):
    assert write_random_weights(tmp_path, tiny.config, file_bytes=1 << 14) > 2
    weights = hf.open_weights(tmp_path, tiny.model)
    params, digest = weights.load(mesh=mesh)
    devices = [mesh.devices[2, 1], mesh.devices[0, 0]]
    found, same = weights.load_shards(mesh, devices)
    assert digest == same == weights.digest()
    for name, leaf in flatten_named(params).items():
        assert list(found[name]) == devices
        wanted = {shard.device: shard.data for shard in leaf.addressable_shards}
        for device, array in found[name].items():
            assert array.devices() == {device}
            np.testing.assert_array_equal(array, wanted[device])
    np.testing.assert_array_equal(
        weights.read("layers/attn/o_proj/kernel"), params["layers"]["attn"]["o_proj"]["kernel"]
    )


def test_an_error_in_a_strip_is_the_errors_name_and_ends_the_others(small_strips, pool):
    class Broken(InMemory):
        def read(self, index):
            raise CheckpointError("layer 1 is damaged")

    source, whole = kernels()
    source.tensors[1] = Broken(source.tensors[1].values)
    with pytest.raises(CheckpointError, match="layer 1 is damaged"):
        read_shard(source, whole.shape, np.dtype("float32"), pool, (slice(None),) * 3)
