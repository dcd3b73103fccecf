"""Virtual tokens in front of packed rows: each text sees them, and is as it would be alone behind them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.apply import bind, bind_slots
from popax.adapters.base import AdapterConfig
from popax.adapters.chain import chain
from popax.adapters.cohort import Cohort
from popax.errors import ConfigError, SiteError
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.modeling.virtual import virtual_ids
from popax.types import NO_ADAPT

COUNT = 3
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def model():
    return Model(
        ModelConfig(
            vocab_size=40,
            embed_dim=16,
            ffw_dim=24,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            max_seq_len=64,
        )
    )


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def prompt(model, params):
    """(cohort, a loud state, what its users share)."""
    cohort = Cohort.of(AdapterConfig(method="prompt", rank=COUNT), model.sites())
    state = {"embed": {"prompt": jax.random.normal(jax.random.key(1), (COUNT, 16))}}
    return cohort, state, cohort.shared(*model.site_arrays(params))


def longhand(model, params, prompt, tokens):
    """Hidden states of a text: its embeddings behind the prompt's, as one text of the base's."""
    _, state, shared = prompt
    rows = shared["embed"]["rows"] + state["embed"]["prompt"]
    embedded = jnp.concatenate((rows, params["embed"]["embedding"][jnp.asarray(tokens)]))[None]
    places = jnp.zeros((1, embedded.shape[1]), jnp.int32)
    return model.hidden(params, places, embedded_BxTxD=embedded)[0][0, COUNT:]


def test_each_text_of_a_packed_row_is_alone_behind_the_prompt(model, params, prompt):
    cohort, state, shared = prompt
    texts = ([5, 17, 3, 9], [39, 2, 8])
    tokens = jnp.asarray([[*texts[0], *texts[1], 0]])
    positions = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, -1]])
    segments = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 0]])
    adapt = bind(cohort, state, shared)
    own, _ = model.hidden(params, tokens, positions_BxT=positions, segments_BxT=segments, adapt=adapt)
    assert own.shape == (1, 8, 16)
    np.testing.assert_allclose(own[0, :4], longhand(model, params, prompt, texts[0]), **TOLERANCE)
    np.testing.assert_allclose(own[0, 4:7], longhand(model, params, prompt, texts[1]), **TOLERANCE)
    base, _ = model.hidden(params, tokens, positions_BxT=positions, segments_BxT=segments)
    assert float(jnp.max(jnp.abs(own - base)[0, :7])) > 0.1


def test_a_row_without_a_slot_is_the_base(model, params, prompt):
    """To rounding: its sums have more terms, all zero. Where there is a cache, such a row has no virtual tokens."""
    cohort, state, shared = prompt
    tokens = jnp.asarray([[5, 17, 3], [5, 17, 3]])
    pool = jax.tree.map(lambda leaf: leaf[None], state)
    own, _ = model.hidden(params, tokens, adapt=bind_slots(cohort, pool, shared, jnp.asarray([0, -1])))
    base, _ = model.hidden(params, tokens)
    np.testing.assert_allclose(own[1], base[1], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(own[0], longhand(model, params, prompt, [5, 17, 3]), **TOLERANCE)


def test_two_lengths_in_one_batch_need_a_cache(model, params, prompt):
    cohort, state, shared = prompt
    other = Cohort.of(AdapterConfig(method="prompt", rank=2), model.sites())
    pools = [jax.tree.map(lambda leaf, n=n: leaf[None, :n], state) for n in (3, 2)]
    rows = [jax.tree.map(lambda leaf, n=n: leaf[:n], shared) for n in (3, 2)]
    slot = jnp.zeros(1, jnp.int32)
    both = chain([bind_slots(*each, slot) for each in zip((cohort, other), pools, rows, strict=True)])
    with pytest.raises(ConfigError, match=r"\[2, 3\] virtual tokens in one batch"):
        model.hidden(params, jnp.asarray([[1, 2]]), adapt=both)


def test_the_table_of_embeddings_is_a_site_without_a_linear_map(model, params):
    info = model.sites()["embed"]
    assert (info.kind, info.d_in, info.d_out, info.layers) == ("embedding", 40, 16, 0)
    np.testing.assert_array_equal(model.site_weight(params, "embed"), params["embed"]["embedding"])
    with pytest.raises(SiteError, match="no linear map 'embed'"):
        model.with_site_weight(params, "embed", params["embed"]["embedding"])


def test_the_base_has_none():
    assert (NO_ADAPT.virtual_tokens, virtual_ids(2)) == (0, [-1, -2])
    assert not NO_ADAPT.has_virtual(3).any()
