"""What a session leaves is where the user's next texts begin, and nothing else of the adapter changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.apply import bind
from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.errors import ConfigError, DataError
from popax.modeling.cache import init_cache
from popax.serving.remember import forget, read_text

TEXT = [5, 17, 3, 9, 22, 1, 30, 8]


@pytest.fixture(scope="module", params=[{}, {"segment": 4, "states": 2}], ids=["tokens", "segments"])
def reader(request, model, params):
    """(cohort, a loud adapter, what its users share)."""
    targets = ({"pattern": r"layers\.0\.out", "rank": 3}, {"pattern": r"layers\.out", "rank": 2})
    config = AdapterConfig(method="delta_mem", targets=targets, options=request.param)
    cohort, rng = Cohort.of(config, model.sites()), np.random.default_rng(0)
    loud = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)  # noqa: E731
    return cohort, jax.tree.map(loud, cohort.abstract()), cohort.shared(*model.site_arrays(params))


def test_a_text_begins_with_what_the_last_one_left(model, params, reader):
    cohort, adapter, shared = reader
    told = []
    after = read_text(model, params, cohort, adapter, shared, TEXT, told.append)
    assert told == [len(TEXT)]
    cache = init_cache(model.config, 1, 16, memory=cohort.memory)
    _, cache = model.hidden(params, jnp.asarray([TEXT]), cache=cache, adapt=bind(cohort, adapter, shared))
    left_LxW = cache.memory[:, 0, len(TEXT) - 1]
    start = after["layers.out"]["start"]
    np.testing.assert_allclose(left_LxW[:, : start[0].size].reshape(start.shape), start, rtol=1e-6, atol=1e-6)
    for leaf in ("gain", "gate"):
        np.testing.assert_array_equal(after["layers.out"][leaf], adapter["layers.out"][leaf])
    first, later = (
        model.hidden(params, jnp.asarray([[7]]), adapt=bind(cohort, each, shared))[0] for each in (adapter, after)
    )
    assert np.any(first != later)


def test_a_text_longer_than_the_context_is_read_in_windows(model, params, reader):
    cohort, adapter, shared = reader
    long = np.random.default_rng(1).integers(0, 61, 150).tolist()
    told, step = [], adapter
    whole = read_text(model, params, cohort, adapter, shared, long, told.append)
    assert told == [64, 128, 150]
    for first in (0, 64, 128):
        step = read_text(model, params, cohort, step, shared, long[first : first + 64])
    jax.tree.map(np.testing.assert_array_equal, whole, step)


def test_forgetting_is_beginning_with_nothing(model, params, reader):
    cohort, adapter, shared = reader
    blank = forget(cohort, read_text(model, params, cohort, adapter, shared, TEXT))
    np.testing.assert_array_equal(blank["layers.out"]["start"], 0.0)
    other = forget(cohort, adapter)
    jax.tree.map(np.testing.assert_array_equal, blank, other)
    texts = [model(params, jnp.asarray([TEXT]), adapt=bind(cohort, each, shared)) for each in (blank, adapter)]
    assert np.any(texts[0] != texts[1])


def test_what_cannot_remember_is_refused_by_name(model, params, users_of, reader):
    cohort, shared, [adapter, *_] = users_of("lora")
    with pytest.raises(ConfigError, match="'lora' remembers nothing"):
        read_text(model, params, cohort, adapter, shared, TEXT)
    with pytest.raises(ConfigError, match="'lora' remembers nothing"):
        forget(cohort, adapter)
    cohort, adapter, shared = reader
    with pytest.raises(DataError, match="no tokens"):
        read_text(model, params, cohort, adapter, shared, [])
