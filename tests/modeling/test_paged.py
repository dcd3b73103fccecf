"""A paged cache: tokens of several sequences, in rows and groups, meet the pages of their own sequence only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.errors import ConfigError
from popax.modeling.cache import PagedCache
from popax.modeling.model import Model
from popax.modeling.paged import page_shapes
from tests.modeling.conftest import CONFIGS

PAGE, PAGES = 4, 16
LENGTHS = (11, 7)


@functools.partial(jax.jit, static_argnums=0)
def step(model, params, tokens_Mx1, positions_Mx1, cache):
    x, cache = model.hidden(params, tokens_Mx1, positions_BxT=positions_Mx1, cache=cache)
    return model.logits(params, x), cache


@pytest.mark.parametrize("family", CONFIGS)
def test_groups_then_rows_are_the_whole_forward(family):
    """Two prompts in groups of 4 (two of one prompt in a step), then token by token, both sequences in a step."""
    model = Model(CONFIGS[family])
    params = model.init(jax.random.key(1))
    texts = [np.random.default_rng(at).integers(0, 64, length) for at, length in enumerate(LENGTHS)]
    owned = np.array([[9, 2, 14, 0], [3, 8, 5, 0]], np.int32)  # pages in no order; the last entries are anybody's
    pages = tuple(jnp.full(like.shape, 7.0, like.dtype) for like in page_shapes(model.config, PAGES, PAGE))
    wanted = [np.asarray(model.logits(params, model.hidden(params, jnp.asarray(text[None]))[0]))[0] for text in texts]

    groups = [(0, 0, 4), (0, 4, 2), (1, 0, 3)]  # (text, start, count): 6 tokens of the first, 3 of the second
    tokens, positions = np.zeros((2 + 12, 1), np.int32), np.full((2 + 12, 1), -1, np.int32)
    for at, (text, start, count) in enumerate(groups):
        tokens[2 + 4 * at : 2 + 4 * at + count, 0] = texts[text][start : start + count]
        positions[2 + 4 * at : 2 + 4 * at + count, 0] = range(start, start + count)
    cache = PagedCache(pages, jnp.asarray(owned), jnp.asarray(owned[[text for text, _, _ in groups]]))
    logits, cache = step(model, params, jnp.asarray(tokens), jnp.asarray(positions), cache)
    for at, (text, start, count) in enumerate(groups):
        got = logits[2 + 4 * at : 2 + 4 * at + count, 0]
        np.testing.assert_allclose(got, wanted[text][start : start + count], atol=2e-5)

    at = [6, 3]
    while at != list(LENGTHS):
        live = [at[text] < LENGTHS[text] for text in (0, 1)]
        tokens = np.array([[texts[text][min(at[text], LENGTHS[text] - 1)]] for text in (0, 1)], np.int32)
        positions = np.array([[at[text] if live[text] else -1] for text in (0, 1)], np.int32)
        cache = cache._replace(group_pages_GxN=jnp.zeros((0, 4), jnp.int32))
        logits, cache = step(model, params, jnp.asarray(tokens), jnp.asarray(positions), cache)
        for text in (0, 1):
            if live[text]:
                np.testing.assert_allclose(logits[text, 0], wanted[text][at[text]], atol=2e-5)
                at[text] += 1
    untouched = sorted(set(range(PAGES)) - set(owned[:, :3].ravel().tolist()))
    for leaf in cache.pages:
        np.testing.assert_array_equal(leaf[:, np.array(untouched)], 7.0)  # nobody else's page was written


def test_sizes_that_hold_nothing_are_refused():
    with pytest.raises(ConfigError, match="0 pages"):
        page_shapes(CONFIGS["llama"], 0, 8)
    with pytest.raises(ConfigError, match="int8"):
        page_shapes(CONFIGS["llama"], 1, 8, "int8")
