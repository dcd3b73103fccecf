"""The population step through the real TPU compiler, for a slice that is not attached: kernels in, no collective."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = [
    pytest.mark.aot,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'popax[aot]'"
    ),
]

PROGRAM = textwrap.dedent(
    """
    import collections, json, re
    import jax, jax.numpy as jnp, numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from popax.adapters.base import AdapterConfig
    from popax.adapters.cohort import Cohort
    from popax.kernels import tuning
    from popax.kernels.stacked_lora.arg_specs import ArgSpec
    from popax.modeling.config import ModelConfig
    from popax.modeling.model import Model
    from popax.objectives.sft import sft
    from popax.population.optimizer import adamw, constant
    from popax.population.state import hparams, init_population
    from popax.population.step import population_step
    from popax.types import Batch

    # Qwen3-0.6B's layers, two of them.
    model = Model(ModelConfig(
        vocab_size=151936, embed_dim=1024, ffw_dim=3072, num_layers=2, num_heads=16, num_kv_heads=8, head_dim=128,
        qk_norm=True, tied_embeddings=True, max_seq_len=512, dtype="bfloat16", param_dtype="bfloat16"))
    cohort = Cohort.of(AdapterConfig(rank=16), model.sites())
    users, rows, tokens = 64, 1, 512
    mesh = Mesh(np.array(topologies.get_topology_desc("v5e:2x2", platform="tpu").devices), ("population",))

    def abstract(tree, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    settings = hparams(learning_rate=1e-3, max_steps=10, clip_norm=1.0)
    keys = jax.ShapeDtypeStruct((users,), jax.random.key(0).dtype)
    state = jax.eval_shape(lambda keys: init_population(cohort, adamw(), keys, settings), keys)
    integers = jax.ShapeDtypeStruct((users, rows, tokens), jnp.int32)
    floats = jax.ShapeDtypeStruct((users, rows, tokens), jnp.float32)
    batch = Batch(integers, integers, floats, integers, integers, integers)
    step = population_step(cohort, sft(model, remat="full"), adamw(), constant(), spmd_axis_name="population")
    operands = (abstract(model.abstract()), {}, abstract(state, "population"), abstract(batch, "population"))
    with jax.set_mesh(mesh):
        compiled = jax.jit(step, donate_argnums=2).lower(*operands).compile()
    text = compiled.as_text()

    def chosen(site, name):
        spec = ArgSpec("", users, rows * tokens, site.info.d_in, site.info.d_out, 16)
        return tuning.choose(f"stacked_lora.{name}", "TPU v5 lite", spec, "bfloat16").implementation == "pallas_tpu"

    print(json.dumps({
        "chosen": {name: sum(chosen(site, name) for site in cohort.sites) for name in ("forward", "backward")},
        "kernels": collections.Counter(re.findall(r"%(popax_[a-z_]+)[.0-9]* = .*custom-call", text)),
        "collectives": re.findall(
            r"= .* (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)", text),
        }))
    """
)


@pytest.fixture(scope="module")
def report():
    environment = os.environ | {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_kernels_are_inside(report):
    """Seven sites share one layer scan: a kernel stands in the program once, at least, for each site where the tuned
    rows name it; the others are XLA's."""
    assert 0 < min(report["chosen"].values()) <= max(report["chosen"].values()) == 7
    for name, count in report["chosen"].items():
        assert report["kernels"].get(f"popax_stacked_lora_{name}", 0) >= count


def test_no_collective_crosses_users(report):
    """Invariant 10."""
    assert report["collectives"] == []
