"""Norms, products and overlaps of changes, against numpy on the dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.changes import layers_of
from popax.adapters.measures import gram, interference, spectral_norms, subspace_overlap
from popax.adapters.table import METHODS

ADDING = [name for name, method in METHODS.items() if method.factors is not None]


def _population(toy, row, users):
    cohort = toy.cohort(row=row)
    adapters = [toy.trained(cohort, seed) for seed in range(users)]
    return cohort, toy.shared(cohort), adapters, jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)


def _dense(cohort, shared, adapter):
    changes = layers_of(cohort, adapter, shared)
    return {name: np.einsum("lrd,lrf->ldf", *map(np.float64, change)) for name, change in changes.items()}


@pytest.mark.parametrize("row", ADDING)
def test_inner_products_and_cosines_are_the_dense_ones(toy, row):
    cohort, shared, adapters, population = _population(toy, row, 4)
    flat = [np.concatenate([w.ravel() for w in _dense(cohort, shared, each).values()]) for each in adapters]
    want = np.array([[one @ other for other in flat] for one in flat])
    got = gram(cohort, population, shared)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.max(np.abs(want)))
    cosine, norm = interference(cohort, population, shared)
    np.testing.assert_allclose(norm, np.sqrt(np.diag(want)), rtol=1e-4)
    np.testing.assert_allclose(cosine, want / np.outer(norm, norm), atol=1e-4)


def test_products_from_factors_and_from_the_matrices_agree(toy, monkeypatch):
    """Which way is less work depends on sizes; the small model takes one of them, a wide layer the other."""
    from popax.adapters import measures

    key = jax.random.split(jax.random.key(0))
    a, b = jax.random.normal(key[0], (5, 2, 40)), jax.random.normal(key[1], (5, 2, 30))
    w = np.einsum("nrd,nrf->ndf", np.float64(a), np.float64(b)).reshape(5, -1)
    np.testing.assert_allclose(measures._layer_gram(a, b), w @ w.T, rtol=1e-4, atol=1e-3)
    wide = jnp.concatenate([a] * 20, axis=1), jnp.concatenate([b] * 20, axis=1)
    np.testing.assert_allclose(measures._layer_gram(*wide), 400 * (w @ w.T), rtol=1e-4, atol=1e-1)


def test_nobodys_change_has_no_cosine(toy):
    cohort, shared, adapters, _ = _population(toy, "lora", 2)
    nobody = toy.init(cohort, jax.random.key(0))
    cosine, norm = interference(cohort, jax.tree.map(lambda *x: jnp.stack(x), adapters[0], nobody), shared)
    np.testing.assert_allclose(cosine, [[1.0, 0.0], [0.0, 0.0]], atol=1e-6)
    assert float(norm[1]) == 0.0


@pytest.mark.parametrize("row", ADDING)
def test_spectral_norms_are_the_largest_singular_values(toy, row):
    cohort, shared, adapters, _ = _population(toy, row, 1)
    for name, w in _dense(cohort, shared, adapters[0]).items():
        want = np.linalg.norm(w, ord=2, axis=(1, 2))
        np.testing.assert_allclose(spectral_norms(cohort, adapters[0], shared)[name], want, rtol=1e-4, atol=1e-6)


def test_overlap_is_one_for_a_span_and_a_share_by_chance():
    rows = jax.random.normal(jax.random.key(0), (4, 400))
    mixed = jax.random.normal(jax.random.key(1), (4, 4)) @ rows
    np.testing.assert_allclose(subspace_overlap(rows, mixed), 1.0, rtol=1e-5)
    keys = jax.random.split(jax.random.key(2), 200)
    by_chance = jax.vmap(lambda key: subspace_overlap(rows, jax.random.normal(key, (4, 400))))(keys)
    np.testing.assert_allclose(jnp.mean(by_chance), 4 / 400, rtol=0.2)
