"""What the kernels' tests share: operands, oracles in float64 and the error that a dtype may make."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = Path(__file__).parent
UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def oracle_delta(x, a, b, scale):
    """One user, one token group, float64: delta_tf = s sum_r (sum_d x_td a_rd) b_rf."""
    return scale * np.einsum("td,rd,rf->tf", *(np.asarray(each, np.float64) for each in (x, a, b)), optimize=True)


def oracle_vjp(g, x, a, b, scale):
    """The same user's (dx, da, db, ds), each written as its own sum."""
    g, x, a, b = (np.asarray(each, np.float64) for each in (g, x, a, b))
    dx = scale * np.einsum("tf,rf,rd->td", g, b, a, optimize=True)
    da = scale * np.einsum("tf,rf,td->rd", g, b, x, optimize=True)
    db = scale * np.einsum("tf,td,rd->rf", g, x, a, optimize=True)
    ds = np.einsum("tf,td,rd,rf->", g, x, a, b, optimize=True)
    return dx, da, db, ds


def assert_close(got, want, magnitude, dtype, terms):
    """|got - want| <= (a rounding for each of `terms` float32 additions and six in dtype) x the sum of |products|."""
    bound = (terms * UNIT_ROUNDOFF["float32"] + 6 * UNIT_ROUNDOFF[dtype]) * magnitude + 1e-30
    error = np.abs(np.asarray(got, np.float64) - want)
    assert np.all(error <= bound), f"worst error {np.max(error / bound):.2f} of the bound"


def normal(seed, shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def primitives(jaxpr):
    """How often each primitive stands in a jaxpr, those inside calls included."""
    counts = Counter()
    for eqn in jaxpr.eqns:
        counts[eqn.primitive.name] += 1
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                counts += primitives(inner)
    return counts


@pytest.fixture(scope="session")
def lora_math():
    return SimpleNamespace(
        delta=oracle_delta, vjp=oracle_vjp, assert_close=assert_close, normal=normal, primitives=primitives
    )


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """Every test of this folder is marked; the hook is given all that are collected."""
    for item in items:
        if item.path.is_relative_to(FOLDER):
            item.add_marker("kernels")
