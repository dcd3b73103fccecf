"""The benchmark measures what it says: the same tokens, the same function, no compilation inside a round."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.base import AdapterConfig
from popax.bench.train import BenchTrainConfig, CompileCounter, base_only, bench_train, random_batch
from popax.bench.train_methods import bench_methods
from popax.errors import ConfigError
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.objectives.base import mean_of
from popax.objectives.sft import sft
from popax.types import NO_ADAPT

TINY = ModelConfig(vocab_size=32, embed_dim=16, ffw_dim=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8)


def test_the_report_has_the_figures_that_scripts_rely_on_and_compiles_nothing_after_warm_up():
    lines = []
    config = BenchTrainConfig(users=2, batch_size=1, seq_len=8, repeats=2)
    figures, rows = bench_train(TINY, config, progress=lines.append)
    wanted = {
        "population_over_base_only",
        "population_over_sequential",
        "tokens_per_s",
        "recompilations",
        "peak_bytes",
    }
    assert wanted <= set(figures)
    assert figures["recompilations"] == 0
    assert figures["peak_bytes"] > 0
    middle = figures["population_over_base_only"]
    assert figures["population_over_base_only_lowest"] <= middle <= figures["population_over_base_only_highest"]
    assert figures["population_over_base_only_cpu"] > 0
    assert len(rows) == 2
    assert all(rows[0][name] > 0 for name in ("population", "base_only", "sequential"))
    assert lines


def test_base_only_is_the_gradient_of_the_bases_loss_with_respect_to_its_inputs():
    model, config = Model(TINY), BenchTrainConfig(users=2, batch_size=1, seq_len=8)
    params, batch = model.init(jax.random.key(0)), random_batch(config, 32, 2)
    embedded = model.embed(params, batch.tokens_BxT)
    gradient = base_only(model)(params, embedded, batch)
    assert gradient.shape == embedded.shape
    expected = jax.grad(lambda x: jnp.sum(jax.vmap(lambda one, own: _loss(model, params, one, own))(x, batch)))(
        embedded
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    plain = jax.vmap(lambda own: mean_of(sft(model))(params, NO_ADAPT, own)[0])(batch)
    again = jax.vmap(lambda x, own: _loss(model, params, x, own))(embedded, batch)
    np.testing.assert_allclose(plain, again, rtol=1e-6)


def _loss(model, params, x_BxTxD, own):
    hidden, _ = model.hidden(
        params,
        own.tokens_BxT,
        positions_BxT=own.positions_BxT,
        segments_BxT=own.segments_BxT,
        embedded_BxTxD=x_BxTxD,
    )
    logits = jax.nn.log_softmax(model.logits(params, hidden))
    return -jnp.mean(jnp.take_along_axis(logits, own.targets_BxT[..., None], axis=-1))


def test_the_counter_sees_a_compilation():
    with CompileCounter() as seen:
        jax.jit(lambda x: x * 3.0 + 1.0)(jnp.ones(7)).block_until_ready()
    assert seen.count >= 1


def test_methods_take_turns_on_the_same_tokens():
    config, lines = BenchTrainConfig(users=3, batch_size=1, seq_len=8, repeats=2), []
    adapters = {name: AdapterConfig(method=name, rank=2) for name in ("lora", "lora_xs")}
    figures, rows = bench_methods(TINY, config, adapters, progress=lines.append)
    assert [row["method"] for row in rows] == ["lora", "lora_xs"]
    assert rows[0]["over_lora"] == 1.0
    assert figures["lora_xs_over_lora"] == rows[1]["over_lora"] > 0
    # Two layers of seven matrices: a core of 2 x 2 each.
    assert rows[1]["parameters_per_user"] == 2 * 7 * 4
    assert rows[1]["state_bytes"] < rows[0]["state_bytes"]
    assert len(lines) == 4
    with pytest.raises(ConfigError, match="nonsense"):
        bench_methods(TINY, config, {"nonsense": AdapterConfig(method="nonsense")})
