"""What is computed once and kept is computed exactly, on hosts whose plain products are of fewer bits than float32."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from popax.adapters.measures import spectral_norms, subspace_overlap
from popax.adapters.table import METHODS, ROWS

HIGHEST = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


def products(jaxpr) -> Iterator:
    """Each matrix product of a program, those of its inner programs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


def assert_exact(function, *arguments):
    found = list(products(jax.make_jaxpr(function)(*arguments).jaxpr))
    assert all(precision == HIGHEST for precision in found), f"products of precision {set(found)}"
    return len(found)


@pytest.mark.parametrize("row", [row for row in ROWS if METHODS[ROWS[row].method].refresh is not None])
def test_what_is_derived_after_a_step_is_exact(toy, row):
    cohort = toy.cohort(row)
    adapter, shared = toy.init(cohort, jax.random.key(0)), toy.shared(cohort)
    count = assert_exact(lambda adapter: cohort.refreshed(adapter, shared, toy.weights.__getitem__), adapter)
    assert count > 0 or ROWS[row].method != "dora"


@pytest.mark.parametrize("row", ROWS)
def test_starts_shared_arrays_norms_and_merges_are_exact(toy, row):
    cohort = toy.cohort(row)
    adapter, shared = toy.init(cohort, jax.random.key(0)), toy.shared(cohort)
    assert_exact(cohort.init, jax.random.key(0))
    assert_exact(lambda weights: cohort.shared(weights.__getitem__, toy.biases.__getitem__), toy.weights)
    assert_exact(lambda adapter: cohort.norms(adapter, shared), adapter)
    if cohort.merges:
        for name in cohort.specs:
            merge = lambda adapter, name=name: cohort.merge(name, toy.weights[name], adapter, shared)  # noqa: E731
            assert_exact(merge, adapter)
    if cohort.adds and not any(spec.info.experts for spec in cohort.sites):
        assert assert_exact(lambda adapter: spectral_norms(cohort, adapter, shared), adapter) > 0


def test_the_overlap_of_subspaces_is_exact():
    rows = jnp.ones((2, 5))
    assert assert_exact(subspace_overlap, rows, rows) > 0
