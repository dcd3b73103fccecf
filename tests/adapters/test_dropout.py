"""Dropout on what enters an adapter: one row of the table for each way to enter stands for all that have dropout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.apply import bind
from popax.adapters.method import TIED

# A kernel of its own each: lora's, the shared core's matrix and vector, dora's without y, plain XLA's.
pytestmark = pytest.mark.parametrize("row", ["lora", "dora", "lora_xs", "lora/mica"])


def _equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_dropout_without_a_key_is_off(toy, row):
    plain, dropping = toy.cohort(row=row), toy.cohort(row=row, dropout=0.5)
    adapter = toy.trained(plain)
    without = toy.run(plain, adapter, toy.x())
    _equal(toy.run(dropping, adapter, toy.x()), without)
    _equal(toy.run(plain, adapter, toy.x(), dropout_key=jax.random.key(0)), without)
    assert np.any(toy.run(dropping, adapter, toy.x(), dropout_key=jax.random.key(0)) != without)


def test_dropout_is_unbiased_and_only_in_the_adapter(toy, row):
    """E[delta(drop(x))] = delta(x) at the head, where nothing non-linear follows; y never loses a feature."""
    cohort = toy.cohort(row=row, dropout=0.3, targets=("lm_head",))
    adapter, x = toy.trained(cohort), toy.x()
    keys = jax.random.split(jax.random.key(0), 4000)
    outs = jax.jit(jax.vmap(lambda key: toy.run(cohort, adapter, x, dropout_key=key)))(keys)
    error = np.abs(jnp.mean(outs, axis=0) - toy.run(cohort, adapter, x))
    assert np.all(error <= 6.0 * np.std(outs, axis=0) / np.sqrt(len(keys)) + 1e-5)
    fresh = toy.init(cohort, jax.random.key(0))
    _equal(toy.run(cohort, fresh, x, dropout_key=keys[0]), toy.base(x))


def test_dropout_differs_by_user_layer_and_site(toy, row):
    """Equal states at every layer and site of one shape: only the masks can differ."""
    info = dataclasses.replace(toy.sites["layers.attn.q_proj"], d_in=12, d_out=12)
    sites = {name: dataclasses.replace(info, name=name) for name in ("layers.attn.q_proj", "layers.attn.k_proj")}
    square = dataclasses.replace(toy, sites=sites)
    cohort = square.cohort(row=row, dropout=0.5, targets=("layers.*",))
    weight = jnp.broadcast_to(toy.weights["lm_head"][:, :12], (3, 12, 12))
    shared = cohort.shared(lambda name: weight)
    # tiny_lora's P is each place's own: here it is the same too.
    first = jax.tree.map(lambda leaf: leaf[:1].repeat(3, 0), shared.get("layers.attn.q_proj", {}))
    shared = dict.fromkeys(sites, first)
    keys = iter(jax.random.split(jax.random.key(4), 100))
    if cohort.method.tied:
        adapter = {TIED: {"v": jax.random.normal(next(keys), (1, 13))}}
    else:
        one = jax.tree.map(
            lambda leaf: jax.random.normal(next(keys), leaf.shape[1:]), cohort.abstract()["layers.attn.q_proj"]
        )
        adapter = {name: jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (3, *leaf.shape)), one) for name in sites}
    x, y = jnp.ones((4, 12)), jnp.zeros((4, 12))

    def outputs(key):
        layers = bind(cohort, adapter, shared, dropout_key=key).layers
        slices = [jax.tree.map(lambda leaf: leaf[layer], layers) for layer in range(3)]  # noqa: B023
        return [np.asarray(layer(x, {name: y})[name]) for layer in slices for name in sites]

    first, again, other_user = (outputs(jax.random.key(seed)) for seed in (0, 0, 1))
    _equal(first, again)
    everything = [out.tobytes() for out in first + other_user]
    assert len(set(everything)) == len(everything)


def test_dropout_masks_differ_in_a_vmapped_population(toy, row):
    cohort = toy.cohort(row=row, dropout=0.5)
    adapter, x = toy.trained(cohort), toy.x()
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(lambda key: toy.run(cohort, adapter, x, dropout_key=key)))(keys)
    for user in range(3):
        np.testing.assert_allclose(
            together[user], toy.run(cohort, adapter, x, dropout_key=keys[user]), rtol=1e-5, atol=1e-5
        )
    assert np.any(together[0] != together[1])
