"""Rows that are longer than what goes in strips: the model's loss and gradients are those of the whole mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.apply import bind
from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.modeling import attention
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.objectives.base import mean_of
from popax.objectives.sft import sft
from tests.population.conftest import make_batch

SMALL = {
    "vocab_size": 32,
    "embed_dim": 16,
    "ffw_dim": 24,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "max_seq_len": 64,
}
MLA = {"kv_latent_dim": 8, "nope_head_dim": 4, "rope_head_dim": 4, "v_head_dim": 6}


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize(
    ("changes", "method"), [({}, "lora"), ({"mla": MLA, "num_kv_heads": 2}, "lora"), ({}, "prompt"), ({}, "delta_mem")]
)
def test_blocks_are_strips(monkeypatch, changes, method, remat):
    model = Model(ModelConfig(**SMALL | changes))
    params = model.init(jax.random.key(7))
    targets = {"prompt": "embed", "delta_mem": r"layers\.out"}.get(method, r"layers\..*_proj")
    cohort = Cohort.of(AdapterConfig(method=method, rank=2, targets=targets), model.sites())
    shared = cohort.shared(*model.site_arrays(params))
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, cohort.init(jax.random.key(1)))
    batch = jax.tree.map(lambda leaf: leaf[0], make_batch(1, rows=2, tokens=40))

    def gradient(longest):
        monkeypatch.setattr(attention, "LONGEST_IN_STRIPS", longest)
        loss = lambda adapter: mean_of(sft(model, remat=remat))(params, bind(cohort, adapter, shared), batch)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(adapter)

    (loss, grads), (again, others) = gradient(512), gradient(8)
    np.testing.assert_allclose(loss, again, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), grads, others)


def test_a_long_row_has_no_square_of_itself():
    model = Model(ModelConfig(**SMALL | {"max_seq_len": 2048}))
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    text = str(jax.make_jaxpr(lambda params, tokens: model.hidden(params, tokens)[0])(params, tokens))
    assert "2048,16" in text
    assert "2048,2048" not in text
