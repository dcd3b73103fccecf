"""Routed experts of Qwen3-30B-A3B's shape through the real TPU compiler: one layer with adapters, and its gradient."""

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
    import json, re
    import jax, jax.numpy as jnp, numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from popax.modeling.experts import Choice, ExpertWeights, Values
    from popax.modeling.routed import routed_experts
    from popax.types import ExpertFactors

    N, M, D, F, K, E, Q = 8, 512, 2048, 768, 8, 128, 8
    devices = np.array(topologies.get_topology_desc("v5e:2x2", platform="tpu").devices)

    def one(values, factors, weights, expert):
        outputs = routed_experts(values, Choice(expert, jnp.zeros((M, 1), jnp.int32)), weights, factors)
        return sum(jnp.sum(jnp.square(leaf).astype(jnp.float32)) for leaf in outputs)

    step = jax.vmap(jax.grad(one, argnums=(0, 1)), in_axes=(0, 0, None, 0), spmd_axis_name="population")
    report = {}
    for name, axes in {"users": (4,), "experts": (2, 2)}.items():
        mesh = Mesh(devices.reshape(axes), ("population", "expert")[: len(axes)])

        def abstract(shape, dtype, *spec):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

        held = ("expert",) if len(axes) > 1 else ()
        wide, narrow = (abstract(shape, jnp.bfloat16, *held) for shape in ((E, D, F), (E, F, D)))
        x, low = (abstract((N, M, width), jnp.bfloat16, "population") for width in (D, Q))
        factor = abstract((N, 1, E, Q, F), jnp.bfloat16, "population", None, *held)
        operands = (
            Values(x, abstract((N, M, K), jnp.float32, "population"), low, low),
            ExpertFactors(gate=factor, up=factor, down=factor, in_order=True),
            ExpertWeights(wide, wide, narrow), abstract((N, M, K), jnp.int32, "population"))
        # A step gives an adapter's gradients to an optimizer whose moments lie as the adapter does.
        like = jax.tree.map(lambda leaf: leaf.sharding, operands[:2])
        with jax.set_mesh(mesh):
            compiled = jax.jit(step, out_shardings=like).lower(*operands).compile()
        text = compiled.as_text()
        report[name] = {
            "kernels": len(re.findall("tpu_custom_call", text)),
            "collectives": sorted(set(re.findall(
                r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?[(]", text))),
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        }
    print(json.dumps(report))
    """
)
WEIGHT_BYTES = 3 * 128 * 2048 * 768 * 2


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


def test_users_on_different_devices_exchange_nothing(report):
    assert report["users"]["collectives"] == []


def test_tokens_meet_over_the_axis_of_the_experts(report):
    assert report["experts"]["collectives"] == ["all-gather", "reduce-scatter"]


@pytest.mark.parametrize("mesh", ["users", "experts"])
def test_the_compilers_grouped_kernels_are_inside_and_nothing_is_as_large_as_a_copy_for_each_user(report, mesh):
    """gate, up, down and three products back, and those with factors; weights for each of 8 users would be 9.7 GB."""
    assert report[mesh]["kernels"] >= 10
    assert report[mesh]["temporary_bytes"] < 2 * WEIGHT_BYTES
