"""Norm budgets on an adapter whose norms are known: 3 and 4 at the layers of one site, 12 at another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.errors import ConfigError
from popax.population.bounds import check_bounds, check_kind, total_norm, within_budget
from popax.types import SiteInfo

SITES = {
    name: SiteInfo(name=name, d_in=4, d_out=5, layers=2, axes=("embed", "heads"))
    for name in ("layers.attn.q_proj", "layers.mlp.up_proj")
}
SIZES = {"layers.attn.q_proj": (3.0, 4.0), "layers.mlp.up_proj": (0.0, 12.0)}
FROBENIUS, SPECTRAL = 13.0, 12.0


def cohort_of(method="lora", **options):
    return Cohort.of(AdapterConfig(method=method, rank=2, alpha=2.0, targets=tuple(SITES), **options), SITES)


@pytest.fixture(scope="module")
def adapter():
    """Each layer's change is one number times an outer product of unit vectors: that number is both norms."""
    made = {}
    for name, sizes in SIZES.items():
        a_LxRxD, b_LxRxF = np.zeros((2, 2, 4), np.float32), np.zeros((2, 2, 5), np.float32)
        a_LxRxD[:, 0, 1], b_LxRxF[:, 0, 2] = 2.0, np.asarray(sizes) / 2.0
        made[name] = {"a": jnp.asarray(a_LxRxD), "b": jnp.asarray(b_LxRxF)}
    return made


def test_frobenius_is_of_all_changes_together_and_spectral_of_the_largest(adapter):
    cohort = cohort_of()
    np.testing.assert_allclose(total_norm(cohort, adapter, {}, "frobenius"), FROBENIUS, rtol=1e-6)
    np.testing.assert_allclose(total_norm(cohort, adapter, {}, "spectral"), SPECTRAL, rtol=1e-6)


@pytest.mark.parametrize(("kind", "norm"), [("frobenius", FROBENIUS), ("spectral", SPECTRAL)])
def test_what_is_over_its_budget_is_shrunk_to_it_in_proportion(adapter, kind, norm):
    cohort = cohort_of()
    shrunk = within_budget(cohort, adapter, {}, jnp.float32(norm / 4), kind)
    np.testing.assert_allclose(total_norm(cohort, shrunk, {}, kind), norm / 4, rtol=1e-5)
    for site, sizes in SIZES.items():
        changes = np.einsum("lrd,lrf->ldf", shrunk[site]["a"], shrunk[site]["b"])
        np.testing.assert_allclose(changes[:, 1, 2], np.asarray(sizes) / 4, rtol=1e-5)


@pytest.mark.parametrize("budget", [FROBENIUS * 1.01, 100.0, np.inf])
def test_what_is_within_its_budget_keeps_its_bits(adapter, budget):
    kept = within_budget(cohort_of(), adapter, {}, jnp.float32(budget), "frobenius")
    jax.tree.map(np.testing.assert_array_equal, kept, adapter)


def test_an_adapter_that_changes_nothing_stays_so(adapter):
    """Norm 0, and a budget as small as there is: nothing is divided by 0."""
    nothing = jax.tree.map(jnp.zeros_like, adapter)
    assert float(total_norm(cohort_of(), nothing, {}, "frobenius")) == 0.0
    with jax.debug_infs(True), jax.debug_nans(True):
        kept = within_budget(cohort_of(), nothing, {}, jnp.float32(1e-30), "frobenius")
    jax.tree.map(np.testing.assert_array_equal, kept, nothing)


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
@pytest.mark.parametrize("budget", [1e-6, 1.0, 3.0, float("inf")])
def test_a_positive_budget_and_a_finite_weight_pass(budget, kl_weight):
    check_bounds(budget, kl_weight)


@pytest.mark.parametrize(
    ("budget", "kl_weight", "words"),
    [
        (0.0, 0.0, "norm_budget=0.0"),
        (-1.0, 0.0, "norm_budget=-1.0"),
        (float("nan"), 0.0, "norm_budget=nan"),
        (1.0, -0.1, "kl_weight=-0.1"),
        (1.0, float("inf"), "kl_weight=inf"),
        (1.0, float("nan"), "kl_weight=nan"),
    ],
)
def test_other_bounds_are_refused_by_name(budget, kl_weight, words):
    with pytest.raises(ConfigError, match=words):
        check_bounds(budget, kl_weight)


def test_a_method_whose_change_shrinks_with_its_state_has_a_budget():
    for kind in ("frobenius", "spectral"):
        check_kind(cohort_of(), kind)
    check_kind(cohort_of("ia3"), "frobenius")


@pytest.mark.parametrize(
    ("method", "options", "kind", "words"),
    [
        ("lora", {}, "nuclear", "norm budget 'nuclear': one of frobenius, spectral"),
        ("dora", {}, "frobenius", r"method='dora' \(init='default'\) has no norm budget"),
        ("lora", {"init": "pissa"}, "frobenius", r"method='lora' \(init='pissa'\) has no norm budget"),
        ("ia3", {}, "spectral", "method='ia3' has no spectral norm"),
    ],
)
def test_what_has_no_budget_says_so(method, options, kind, words):
    with pytest.raises(ConfigError, match=words):
        check_kind(cohort_of(method, **options), kind)
