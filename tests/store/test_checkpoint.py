import json
import os
import random
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from popax.errors import CheckpointError, StorageError
from popax.store.checkpoint import CheckpointStore
from popax.store.cohort import StoredCohort

N = 8


class State(NamedTuple):
    step: jax.Array
    opt_state: object
    rng: jax.Array
    best: object


@pytest.fixture
def population():
    """(adapters, train_state) of 8 members: several dtypes, an optimizer's state, typed keys, NaN, numbers [N]."""
    key = jax.random.key(7)
    adapters = {
        "layers.attn.q_proj": {
            "a": jax.random.normal(key, (N, 2, 4, 16)),
            "b": jax.random.normal(key, (N, 2, 4, 16), jnp.bfloat16),
        },
        "lm_head": {"s": jnp.arange(N, dtype=jnp.float32).at[3].set(jnp.nan)},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = State(
        step=jnp.arange(N, dtype=jnp.int32),
        opt_state=jax.vmap(optimizer.init)(adapters),
        rng=jax.random.split(key, N),
        best={"active": jnp.arange(N) % 2 == 0, "none": None, "raw": jax.random.key_data(jax.random.split(key, N))},
    )
    return adapters, state


def _mesh_sharding(devices):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("population",))
    return NamedSharding(mesh, PartitionSpec("population"))


def _bits(tree):
    as_data = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf  # noqa: E731
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(str(leaf.dtype), leaf.shape, np.asarray(as_data(leaf)).tobytes()) for leaf in leaves]


def _abstract(tree, sharding=None):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


@pytest.mark.parametrize(("saved_on", "restored_on"), [(8, 8), (8, 4), (8, 1), (1, 8), (4, 2)])
def test_restoring_is_bitwise_on_any_mesh(tmp_path, population, saved_on, restored_on):
    """Invariant 6: a restored state is the saved one, bit for bit."""
    adapters, state = jax.tree.map(lambda leaf: jax.device_put(leaf, _mesh_sharding(saved_on)), population)
    store = CheckpointStore(tmp_path)
    store.save(5, adapters=adapters, train_state=state, record={"queue": [1, 2]})
    sharding = _mesh_sharding(restored_on)
    step, got_adapters, got_state, record = store.restore(
        adapters=_abstract(adapters, sharding), train_state=_abstract(state, sharding)
    )
    assert (step, record) == (5, {"queue": [1, 2]})
    assert _bits(got_adapters) == _bits(adapters)
    assert _bits(got_state) == _bits(state)
    for leaf in jax.tree.leaves((got_adapters, got_state)):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    store.close()


@pytest.mark.parametrize("devices", [1, 8])
def test_each_member_is_a_chunk(tmp_path, population, devices):
    adapters, state = jax.tree.map(lambda leaf: jax.device_put(leaf, _mesh_sharding(devices)), population)
    with_store = CheckpointStore(tmp_path)
    with_store.save(1, adapters=adapters, train_state=state, record={})
    for name, shape in (("layers.attn.q_proj.a", [1, 2, 4, 16]), ("lm_head.s", [1])):
        metadata = json.loads((tmp_path / "1" / "adapters" / name / "zarr.json").read_text())
        assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == shape
        assert len(list((tmp_path / "1" / "adapters" / name / "c").iterdir())) == N
    with_store.close()


def test_a_second_mesh_axis_splits_a_member_further(tmp_path, population):
    adapters, state = population
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("population", "tensor"))
    wide = NamedSharding(mesh, PartitionSpec("population", None, None, "tensor"))
    adapters = {"s": {"a": jax.device_put(adapters["layers.attn.q_proj"]["a"], wide)}}
    store = CheckpointStore(tmp_path)
    store.save(1, adapters=adapters, train_state=state, record={})
    restored = store.restore(adapters=_abstract(adapters), train_state=state)
    assert _bits(restored.adapters) == _bits(adapters)
    assert len(restored.adapters["s"]["a"].devices()) == 1
    store.close()


def test_without_templates_numpy_by_name(tmp_path, population):
    adapters, state = population
    with_store = CheckpointStore(tmp_path)
    with_store.save(1, adapters=adapters, train_state=state, record={"run": "r"})
    restored = CheckpointStore(tmp_path, read_only=True).restore()
    assert isinstance(restored.adapters["lm_head"]["s"], np.ndarray)
    assert _bits(restored.adapters) == _bits(adapters)
    assert restored.train_state["opt_state.1.0.mu.lm_head.s"].shape == (N,)
    assert jnp.issubdtype(restored.train_state["rng"].dtype, jax.dtypes.prng_key)
    with_store.close()


def test_numpy_arrays_and_an_empty_train_state(tmp_path):
    adapters = {"s": {"x": np.arange(6, dtype=np.float64).reshape(3, 2)}}
    store = CheckpointStore(tmp_path)
    store.save(1, adapters=adapters, train_state={}, record={})
    restored = store.restore(adapters=adapters, train_state={})
    assert _bits(restored.adapters) == _bits(adapters)
    assert restored.train_state == {}
    store.close()


def test_steps_are_kept_and_named(tmp_path, population):
    adapters, state = population
    store = CheckpointStore(tmp_path, keep=2)
    assert store.latest() is None
    with pytest.raises(CheckpointError, match="no checkpoint of step None"):
        store.restore()
    for step in (3, 6, 9):
        store.save(step, adapters=adapters, train_state=state, record={"step": step})
    assert (store.latest(), store.steps()) == (9, [6, 9])
    assert store.restore(6).record == {"step": 6}
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; it has steps \[6, 9\]"):
        store.restore(3)
    with pytest.raises(CheckpointError, match="already holds step 9"):
        store.save(9, adapters=adapters, train_state=state, record={})
    store.close()


def test_saving_asynchronously(tmp_path, population):
    adapters, state = population
    store = CheckpointStore(tmp_path, asynchronous=True)
    store.save(1, adapters=adapters, train_state=state, record={})
    store.wait()
    assert _bits(store.restore(adapters=adapters, train_state=state).train_state) == _bits(state)
    store.close()


def test_what_does_not_fit_is_named(tmp_path, population):
    adapters, state = population
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="'step'"):
        store.save(1, adapters=adapters, train_state=state._replace(step=jnp.int32(0)), record={})
    with pytest.raises(CheckpointError, match="2 users for a population of 8"):
        store.save(1, adapters=adapters, train_state=state, record={}, users=["a", "b"])
    with pytest.raises(CheckpointError, match="not JSON"):
        store.save(1, adapters=adapters, train_state=state, record={"x": object()})
    assert store.latest() is None
    store.save(1, adapters=adapters, train_state=state, record={})
    wrong = state._replace(step=state.step.astype(jnp.float32))
    with pytest.raises(CheckpointError, match=r"train_state: 'step' was saved as int32 \[8\], the template is float32"):
        store.restore(adapters=adapters, train_state=wrong)
    with pytest.raises(CheckpointError, match="adapters: only one of template and checkpoint has"):
        store.restore(adapters={"other": {}}, train_state=state)
    store.close()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((CheckpointError, StorageError), match="file"):
        CheckpointStore(tmp_path / "file" / "checkpoints")


def test_shared_arrays_are_kept_once(tmp_path, population, config, specs, layout):
    adapters, state = population
    shared = {"layers.attn.q_proj": {"u": np.arange(4, dtype=np.float32)}}
    cohort = StoredCohort.of(config, specs, "base", layout, shared)
    store = CheckpointStore(tmp_path, cohort=cohort, shared=shared)
    for step in (1, 2):
        store.save(step, adapters=adapters, train_state=state, record={})
    assert [path.name for path in (tmp_path / "shared").iterdir()] == [cohort.shared_digest]
    assert store.steps() == [1, 2]
    other = CheckpointStore(
        tmp_path / "b", cohort=cohort, shared={"layers.attn.q_proj": {"u": np.zeros(4, np.float32)}}
    )
    with pytest.raises(CheckpointError, match="not the cohort's"):
        other.save(1, adapters=adapters, train_state=state, record={})
    store.close()
    other.close()


# Saves steps without end; the parent kills it while a save is under way.
CHILD = """
import sys
import numpy as np
from popax.store.checkpoint import CheckpointStore

store = CheckpointStore(sys.argv[1])
step = store.latest() or 0
while True:
    step += 1
    leaf = np.full((64, 4, 1000), step, np.float32)
    store.save(step, adapters={"s": {"x": leaf}}, train_state={"m": leaf + 1}, record={"step": step})
    print(step, flush=True)
"""


def test_a_killed_save_leaves_the_one_before_it(tmp_path):
    """Invariant 6: a checkpoint is there as a whole or not at all."""
    rng, unfinished = random.Random(0), 0
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        acknowledged = int(child.stdout.readline())
        time.sleep(rng.uniform(0.0, 0.1))
        deadline = time.monotonic() + 20
        while not any("tmp" in path.name for path in tmp_path.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *(int(line) for line in child.stdout)])
        child.wait()
        unfinished += any("tmp" in path.name for path in tmp_path.iterdir())
        store = CheckpointStore(tmp_path)
        assert store.latest() >= acknowledged
        restored = store.restore()
        assert restored.record == {"step": restored.step}
        assert (restored.adapters["s"]["x"] == restored.step).all()
        assert (restored.train_state["m"] == restored.step + 1).all()
        assert not any("tmp" in path.name for path in tmp_path.iterdir())
        store.save(restored.step + 1, adapters=restored.adapters, train_state=restored.train_state, record={})
        store.close()
    assert unfinished


def test_a_reader_leaves_an_unfinished_save_alone(tmp_path, population):
    adapters, state = population
    store = CheckpointStore(tmp_path)
    store.save(1, adapters=adapters, train_state=state, record={})
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    assert CheckpointStore(tmp_path, read_only=True).latest() == 1
    assert (tmp_path / "2.orbax-checkpoint-tmp").exists()
    assert CheckpointStore(tmp_path).latest() == 1
    assert not (tmp_path / "2.orbax-checkpoint-tmp").exists()
    store.close()
