"""Two processes load one Hugging Face directory: together they read and hash it once, each has its shard."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from popax.bench.weight_files import write_random_weights
from popax.modeling.base import load_base
from popax.modeling.config import ModelConfig
from popax.trees import flatten_named

CONFIG = ModelConfig(
    **{"vocab_size": 64, "embed_dim": 32, "ffw_dim": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2},
    **{"head_dim": 8, "qk_norm": True},
)
# Prints what the process hashed, and every shard that it has: {name: {bounds: values}}.
LOAD = """
import json, sys
import jax
import numpy as np
from popax.distributed.bootstrap import ProcessConfig, several_processes
from popax.modeling import hashing
from popax.modeling.base import load_base
from popax.modeling.tensor_files import StoredTensor
from popax.sharding import make_mesh
from popax.trees import flatten_named

hashing.NOTED_FROM_BYTES = 1
hashed, sha256, matrices, read = [], StoredTensor.sha256, [], StoredTensor.read
StoredTensor.sha256 = lambda tensor: hashed.append(tensor.name) or sha256(tensor)

def counted(tensor, index):
    found = read(tensor, index)
    if found.ndim > 1:
        matrices.append(found.nbytes)
    return found

StoredTensor.read = counted
directory, address, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
with several_processes(ProcessConfig(coordinator=address, num_processes=2, process_id=index)):
    base = load_base(directory, mesh=make_mesh("fsdp=4"))
    first = sum(matrices)
    again = load_base(directory, mesh=make_mesh("population=2,tensor=2"))
    total = sum(matrices)
shards = {
    name: [
        [[part.indices(size)[:2] for part, size in zip(shard.index, leaf.shape)], np.asarray(shard.data).tolist()]
        for shard in leaf.addressable_shards
    ]
    for name, leaf in flatten_named(base.params).items()
}
same = all(
    np.array_equal(np.asarray(shard.data), np.asarray(alone)[shard.index])
    for leaf, alone in zip(jax.tree.leaves(again.params), jax.tree.leaves(load_base(directory).params))
    for shard in leaf.addressable_shards
)
numbers = {"matrix_bytes": [first, total - first], "again_is_the_same": same}
print(json.dumps({"hashed": hashed, "digests": [base.digest, again.digest], "shards": shards, **numbers}))
"""


@pytest.mark.slow
def test_two_processes_read_and_hash_every_matrix_once(tmp_path):
    write_random_weights(tmp_path, CONFIG, file_bytes=1 << 14)
    for file in tmp_path.iterdir():
        os.utime(file, (1_700_000_000, 1_700_000_000))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", LOAD, str(tmp_path), address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(index)], env=environment, **pipes) for index in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    found = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
    alone = load_base(tmp_path, verify=True)
    names = sorted(name for one in found for name in one["hashed"])
    assert len(names) == len(set(names)) == 2 * 11 + 3, "each tensor is hashed once, by one of them, in the first load"
    assert all(one["digests"] == [alone.digest] * 2 for one in found)
    matrices = sum(leaf.nbytes for name, leaf in flatten_named(alone.params).items() if not name.endswith("/scale"))
    assert [sum(one["matrix_bytes"][load] for one in found) for load in (0, 1)] == [matrices, matrices]
    assert all(one["again_is_the_same"] for one in found)
    for name, leaf in flatten_named(alone.params).items():
        whole, covered = np.asarray(leaf), np.zeros(leaf.shape, bool)
        for one in found:
            for bounds, values in one["shards"][name]:
                index = tuple(slice(*bound) for bound in bounds)
                np.testing.assert_array_equal(np.asarray(values, whole.dtype), whole[index])
                covered[index] = True
        assert covered.all(), name
