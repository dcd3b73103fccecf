"""Latent attention: absorbed and expanded decode are one function, adapters at the latent projections included."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.errors import ConfigError
from popax.modeling import latent_attention
from popax.modeling.block_config import MLAConfig
from popax.modeling.cache import LatentCache, init_cache
from popax.modeling.config import ModelConfig, YarnRope
from popax.modeling.latent_attention import absorbed_is_cheaper, softmax_scale
from popax.modeling.model import Model

MLA = MLAConfig(q_latent_dim=20, kv_latent_dim=16, nope_head_dim=8, rope_head_dim=4, v_head_dim=10)
SHAPE = {"vocab_size": 64, "embed_dim": 32, "ffw_dim": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4}
CONFIG = ModelConfig(**SHAPE, head_dim=12, max_seq_len=64, mla=MLA)
PROJECTIONS = ("q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj", "o_proj")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Added:
    """An Adapt that adds x w at some sites of the stack."""

    virtual_tokens = 0
    weights: dict[str, jax.Array]

    @property
    def layers(self) -> "Added":
        return self

    @property
    def outer(self) -> "Added":
        return Added({})

    def hidden(self, site, x_BxTxD, positions_BxT, cache):
        del positions_BxT
        return (self(x_BxTxD, {site: x_BxTxD})[site] if self.adapts(site) else x_BxTxD), cache

    def adapts(self, site: str) -> bool:
        return site in self.weights

    def __call__(self, x, ys):
        return {site: y + x @ self.weights[site] if site in self.weights else y for site, y in ys.items()}


@functools.cache
def model_and_params():
    model = Model(CONFIG)
    return model, model.init(jax.random.key(0))


def decode(adapt) -> np.ndarray:
    """Logits of 12 tokens: six at once, the others one by one."""
    model, params = model_and_params()
    tokens = jax.random.randint(jax.random.key(1), (3, 12), 0, 64, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32)[None], (3, 12))
    cache, logits = init_cache(CONFIG, 3, 12), []

    @jax.jit
    def step(params, adapt, tokens, positions, cache):
        x_BxTxD, cache = model.hidden(params, tokens, positions_BxT=positions, cache=cache, adapt=adapt)
        return model.logits(params, x_BxTxD, adapt), cache

    for part in (slice(0, 6), *(slice(at, at + 1) for at in range(6, 12))):
        found, cache = step(params, adapt, tokens[:, part], positions[:, part], cache)
        logits.append(found)
    full = jax.jit(lambda params, adapt: model(params, tokens, adapt=adapt))(params, adapt)
    np.testing.assert_allclose(np.concatenate(logits, axis=1), full, rtol=0, atol=1e-5)
    return np.asarray(full)


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_both_forms_of_decode_equal_the_full_forward(form, monkeypatch):
    monkeypatch.setattr(latent_attention, "absorbed_is_cheaper", lambda *_: form == "absorbed")
    decode(Added({}))


@pytest.mark.parametrize("sites", [*((name,) for name in PROJECTIONS), PROJECTIONS], ids="+".join)
def test_decode_with_adapters_equals_the_full_forward(sites):
    model, _ = model_and_params()
    infos = {f"layers.attn.{site}": model.sites()[f"layers.attn.{site}"] for site in sites}
    keys = jax.random.split(jax.random.key(2), len(infos))
    weights = {
        name: 0.3 * jax.random.normal(key, (info.layers, info.d_in, info.d_out))
        for key, (name, info) in zip(keys, infos.items(), strict=True)
    }
    assert np.abs(decode(Added(weights)) - decode(Added({}))).max() > 0.01


def test_the_cache_holds_a_latent_and_one_key_for_a_token():
    cache = init_cache(CONFIG, 3, 12, "bfloat16")
    assert isinstance(cache, LatentCache)
    assert (cache.latent.shape, cache.latent.dtype, cache.length) == ((2, 3, 12, 16 + 4), jnp.bfloat16, 12)


def test_decoding_does_not_expand_the_cache():
    model, params = model_and_params()
    length = 50
    arguments = (jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), 3, jnp.int32), init_cache(CONFIG, 1, length))
    step = lambda adapt: jax.jit(  # noqa: E731
        lambda params, tokens, positions, cache: model.hidden(
            params, tokens, positions_BxT=positions, cache=cache, adapt=adapt
        )
    ).lower(params, *arguments)
    expanded = f"tensor<1x{length}x{4 * (8 + 10)}xf32>"  # keys and values of all heads for every cached token
    assert expanded not in step(Added({})).as_text()
    kv_b = {"layers.attn.kv_b_proj": jnp.zeros((2, 16, 72))}
    assert expanded in step(Added(kv_b)).as_text()


def test_the_form_follows_from_the_multiplications_of_real_sizes():
    kimi = MLAConfig(q_latent_dim=1536, kv_latent_dim=512, nope_head_dim=128, rope_head_dim=64, v_head_dim=128)
    config = dataclasses.replace(CONFIG, head_dim=192, mla=kimi)
    assert absorbed_is_cheaper(config, kimi, 1, 4096)
    assert absorbed_is_cheaper(config, kimi, 8, 4096)
    assert not absorbed_is_cheaper(config, kimi, 4096, 4096)


def test_yarn_grows_the_scale_where_mscale_all_dim_is_given():
    assert softmax_scale(CONFIG) == pytest.approx(12**-0.5)
    rope = YarnRope(factor=40.0, original_max_seq_len=4096, mscale=1.0, mscale_all_dim=1.0)
    grown = softmax_scale(dataclasses.replace(CONFIG, rope_scaling=rope))
    assert grown == pytest.approx(12**-0.5 * (0.1 * np.log(40.0) + 1) ** 2)
    without = dataclasses.replace(CONFIG, rope_scaling=dataclasses.replace(rope, mscale=None, mscale_all_dim=None))
    assert softmax_scale(without) == pytest.approx(12**-0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 10}, r"head_dim=10, .*nope_head_dim \+ rope_head_dim = 12"),
        ({"num_kv_heads": 2}, "num_kv_heads=2"),
        ({"qk_norm": True}, "qk_norm"),
        ({"mla": {"kv_latent_dim": 16}}, "mla: .*missing keys"),
        ({"mla": {**dataclasses.asdict(MLA), "rope_head_dim": 3}}, "rope_head_dim=3"),
        ({"mla": 3}, "mla=3: MLAConfig"),
        ({"moe": {"num_experts": 4, "experts_per_token": 1, "expert_ffw_dim": 8, "first_dense_layers": 2}}, "no layer"),
    ],
)
def test_a_value_that_does_not_fit_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **changes)
