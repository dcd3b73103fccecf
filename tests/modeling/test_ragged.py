"""jax's ragged paged attention: asked for what gathered pages give, and taken by the TPU's compiler."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as library

from popax.modeling.cache import PagedCache, RaggedCache
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.modeling.paged import page_shapes
from popax.modeling.ragged import fits, ragged_page_shapes
from tests.modeling.conftest import CONFIGS

CONFIG = ModelConfig(
    vocab_size=256, embed_dim=256, ffw_dim=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=128, max_seq_len=256
)


@pytest.mark.slow
def test_the_kernel_is_asked_for_what_gathering_sees(monkeypatch):
    """Two steps: groups of two prompts (one of them in two groups, one group half full), then rows. The kernel is its
    library's own reference here: its block copies have no form in interpret mode (jax 0.10)."""

    def reference(*operands, num_kv_pages_per_block, num_queries_per_block, **options):
        return library.ref_ragged_paged_attention(*operands, **options)

    monkeypatch.setattr(library, "ragged_paged_attention", reference)
    model = Model(CONFIG)
    params = model.init(jax.random.key(0))
    owned = jnp.asarray([[3, 1, 6, 0], [5, 2, 0, 0]], jnp.int32)
    found = {}
    for kind, shapes in ((PagedCache, page_shapes), (RaggedCache, ragged_page_shapes)):
        pages = tuple(jnp.zeros(like.shape, like.dtype) for like in shapes(CONFIG, 8, 16))
        rng = np.random.default_rng(0)

        def step(pages, tokens, positions, groups, kind=kind):
            cache = kind(pages, owned, owned[jnp.asarray(groups, jnp.int32)])
            with jax.disable_jit():
                x, cache = model.hidden(params, tokens, positions_BxT=positions, cache=cache)
            return np.asarray(x[:, 0], np.float32), cache.pages

        tokens = jnp.asarray(rng.integers(0, 256, (2 + 24, 1)), jnp.int32)
        positions = np.full((26, 1), -1, np.int32)
        for at, (start, count) in enumerate([(0, 8), (8, 8), (0, 5)]):
            positions[2 + 8 * at : 2 + 8 * at + count, 0] = range(start, start + count)
        first, pages = step(pages, tokens, jnp.asarray(positions), [0, 0, 1])
        second, _ = step(pages, tokens[:2], jnp.asarray([[16], [5]], jnp.int32), [])
        found[kind] = np.concatenate((first[positions[:, 0] >= 0], second))
    np.testing.assert_allclose(found[RaggedCache], found[PagedCache], atol=2e-2, rtol=2e-2)


def test_models_that_it_has_no_form_for():
    assert fits(CONFIG)
    assert not fits(CONFIGS["deepseek"])
    assert not fits(dataclasses.replace(CONFIG, head_dim=64))


PROGRAM = textwrap.dedent(
    """
    import jax, numpy as np
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding
    from popax.modeling.config import ModelConfig
    from popax.modeling.model import Model
    from popax.modeling.ragged import ragged_page_shapes
    from popax.serving.step import StepShape, empty_inputs, serve_step
    
    # The kernel asks what the attached device is, and there is none: it is told of the one that is compiled for.
    from jax._src.pallas.mosaic import tpu_info
    tpu_info.registry["cpu"] = lambda: tpu_info.get_tpu_info_for_chip(tpu_info.ChipVersion.TPU_V5E, 1)

    # Qwen3-8B's layers, two of them.
    config = ModelConfig(
        vocab_size=151936, embed_dim=4096, ffw_dim=12288, num_layers=2, num_heads=32, num_kv_heads=8, head_dim=128,
        qk_norm=True, max_seq_len=4096, dtype="bfloat16", param_dtype="bfloat16")
    model, shape = Model(config), StepShape(64, 8, 16, 64)
    there = SingleDeviceSharding(topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0])
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there)
    pages = ragged_page_shapes(config, 4096, 16)
    arguments = (model.abstract(), pages, (), empty_inputs(shape, 151936, 1024))
    step = jax.jit(serve_step, static_argnums=(0, 1, 2, 3), donate_argnums=5)
    compiled = step.lower(model, shape, (), True, *jax.tree.map(place, arguments)).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert "tpu_custom_call" in text
    pages_bytes = sum(np.prod(leaf.shape) * 2 for leaf in pages)
    assert memory.alias_size_in_bytes >= pages_bytes, "the pages are not written in place"
    assert memory.temp_size_in_bytes < pages_bytes, "a step makes a copy of the pages"
    print("done")
    """
)


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'popax[aot]'"
)
def test_the_tpu_compiler_takes_a_serving_step():
    """A step of 64 rows and 128 prompt tokens at Qwen3-8B's widths for v5e: the kernel in it, the pages in place."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    environment |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done" in done.stdout
