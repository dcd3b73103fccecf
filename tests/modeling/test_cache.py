"""Keys and values by position: ragged prefill, decode, padding."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from popax.errors import ConfigError
from popax.modeling.cache import LayerCache, init_cache

CLOSE = {"rtol": 0, "atol": 1e-5}


@functools.partial(jax.jit, static_argnums=0)
def step(model, params, tokens, positions, cache):
    """(logits, cache)."""
    x_BxTxD, cache = model.hidden(params, tokens, positions_BxT=positions, cache=cache)
    return model.logits(params, x_BxTxD), cache


def test_ragged_prefill_and_decode_equal_the_full_forward(family):
    lengths, tokens = np.array([3, 7, 5], np.int32), family.tokens(3, 12)
    full = family.forward(family.params, tokens)
    column = np.arange(8, dtype=np.int32)[None]
    positions = np.where(column < lengths[:, None], column, np.int32(-1))
    cache = init_cache(family.config, 3, 12)
    logits, cache = step(family.model, family.params, tokens[:, :8], positions, cache)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], full[row, :length], **CLOSE)
    for offset in range(5):
        position = (lengths + offset)[:, None]
        token = np.take_along_axis(np.asarray(tokens), position, axis=1)
        logits, cache = step(family.model, family.params, token, position, cache)
        np.testing.assert_allclose(logits, np.take_along_axis(np.asarray(full), position[..., None], axis=1), **CLOSE)


def test_a_row_can_be_refilled_without_clearing_it(tiny):
    first, second = tiny.tokens(2, 12)
    positions = np.arange(12, dtype=np.int32)[None]
    full = tiny.forward(tiny.params, second[None])
    _, cache = step(tiny.model, tiny.params, first[None], positions, init_cache(tiny.config, 1, 12))
    logits, cache = step(tiny.model, tiny.params, second[None, :6], positions[:, :6], cache)
    np.testing.assert_allclose(logits, full[:, :6], **CLOSE)
    logits, _ = step(tiny.model, tiny.params, second[None, 6:], positions[:, 6:], cache)
    np.testing.assert_allclose(logits, full[:, 6:], **CLOSE)


def test_padding_and_positions_past_the_end_write_nothing(tiny):
    tokens = tiny.tokens(1, 12)
    positions = np.arange(12, dtype=np.int32)[None]
    _, cache = step(tiny.model, tiny.params, tokens, positions, init_cache(tiny.config, 1, 12))
    for position in (-1, 12, 100):
        logits, after = step(tiny.model, tiny.params, tokens, np.full_like(positions, position), cache)
        jax.tree.map(np.testing.assert_array_equal, cache, after)
        assert np.isfinite(logits).all()


def test_a_cache_may_be_bfloat16_and_takes_no_segments(tiny):
    tokens = tiny.tokens(1, 12)
    positions = np.arange(12, dtype=np.int32)[None]
    logits, cache = step(tiny.model, tiny.params, tokens, positions, init_cache(tiny.config, 1, 12, "bfloat16"))
    assert cache.k.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits, tiny.forward(tiny.params, tokens), rtol=0, atol=0.02)
    with pytest.raises(ConfigError, match="segments"):
        tiny.model.hidden(tiny.params, tokens, segments_BxT=tokens, cache=cache)
    with pytest.raises(ConfigError, match="int8"):
        init_cache(tiny.config, 1, 4, "int8")


def test_sharded_rows_are_written_where_they_lie(tiny):
    """No collective: over an index that it does not know to be the row, the partitioner gathers."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("rows",))
    cache = init_cache(tiny.config, 16, 32)
    new = jnp.ones((16, 2, *cache.k.shape[3:]), cache.k.dtype)
    rows = NamedSharding(mesh, PartitionSpec("rows"))
    stored = NamedSharding(mesh, PartitionSpec(None, "rows"))

    mask = jnp.zeros((16, 2, 32), bool)

    def write(cache, layer, positions_BxT, new):
        return LayerCache(cache=cache, layer=layer, positions_BxT=positions_BxT, mask_BxTxS=mask).write(new, new).cache

    operands = (cache, jnp.int32(1), jnp.arange(32, dtype=jnp.int32).reshape(16, 2) % 8, new)
    sharded = jax.jit(write, in_shardings=(stored, None, rows, rows), out_shardings=stored)
    text = sharded.lower(*operands).compile().as_text()
    assert "scatter" in text or "dynamic-update-slice" in text
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", text)
    jax.tree.map(np.testing.assert_array_equal, sharded(*operands), jax.jit(write)(*operands))
