"""Methods against the formulas of their papers, in numpy, and what ties sites together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort, scales
from popax.adapters.conditioned import fitted
from popax.adapters.method import TIED
from popax.errors import ConfigError
from popax.types import SiteInfo


def test_loreft_is_the_papers_formula_and_its_rows_stay_orthonormal(toy):
    """h + R^T (W h + b - R h) with the rows of R orthonormal, after real training steps."""
    cohort = toy.cohort("reft")
    state = jax.tree.map(np.float64, toy.trained(cohort))["layers.out"]
    h = np.random.default_rng(0).standard_normal((5, 12))
    for layer, rank in enumerate(cohort.sites[0].ranks):
        r, w, b = (state[name][layer] for name in ("r", "w", "b"))
        np.testing.assert_allclose(r @ r.T, np.diag(np.arange(4) < rank).astype(float), atol=1e-5)
        want = h + (h @ (r + w).T + b - h @ r.T) @ r
        own = {name: jnp.asarray(leaf[layer], jnp.float32) for name, leaf in state.items()}
        x = jnp.asarray(h, jnp.float32)
        got = cohort.method.delta(own, {}, scales(cohort.sites[0])[layer], x, x, lambda features: features)
        np.testing.assert_allclose(got, want if rank else h, atol=1e-5)


def test_loreft_acts_on_the_first_tokens_alone_where_asked(toy):
    cohort = toy.cohort("reft", options={"first": 2})
    adapter, x = toy.trained(toy.cohort("reft")), toy.x()
    own, base = toy.run(cohort, adapter, x), toy.base(x)
    np.testing.assert_array_equal(own[:, 2:], base[:, 2:])  # the toy has no attention: later tokens never hear of it
    assert np.any(own[:, :2] != base[:, :2])


def test_svf_scales_singular_values():
    w = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    info = SiteInfo(name="lm_head", d_in=8, d_out=6, layers=0, axes=("embed", "vocab"))
    z = jnp.asarray(np.random.default_rng(1).uniform(-0.5, 0.5, 6), jnp.float32)
    u, s, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    for options, gain in (({}, 1.0), ({"renormalise": True}, s.sum() / (s * (1 + np.asarray(z))).sum())):
        cohort = Cohort.of(AdapterConfig(method="svf", targets="lm_head", options=options), {"lm_head": info})
        shared = cohort.shared(lambda site: jnp.asarray(w))
        merged, _ = cohort.merge("lm_head", jnp.asarray(w), {"lm_head": {"z": z}}, shared)
        np.testing.assert_allclose(merged, (u * s * (1 + np.asarray(z)) * gain) @ vt, atol=2e-5)


def test_dora_columns_have_the_users_magnitude(toy):
    """Every column of W' is m long: m W'/||W'|| of the paper, after steps that moved the direction."""
    cohort = toy.cohort("dora")
    adapter, shared = toy.trained(cohort), toy.shared(cohort)
    merged, _ = cohort.merge("lm_head", toy.weights["lm_head"], adapter, shared, toy.biases["lm_head"])
    want = shared["lm_head"]["norm"] + adapter["lm_head"]["m"]
    np.testing.assert_allclose(np.linalg.norm(merged, axis=0), np.abs(want), rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 3, 5])
def test_groups_are_stretches_of_depth(toy, groups):
    """tiny_lora's vectors: one of each group moves exactly the sites of its stretch."""
    cohort = toy.cohort("tiny_lora", options={"groups": groups})
    shared = toy.shared(cohort)
    assert cohort.num_params == 13 * groups
    moved = []
    for group in range(groups):
        adapter = {TIED: {"v": jnp.zeros((groups, 13)).at[group].set(1.0)}}
        norms = cohort.norms(adapter, shared)
        moved.append({(name, layer) for name, norm in norms.items() for layer in np.flatnonzero(np.atleast_1d(norm))})
    adapted = {(name, layer) for name, spec in cohort.specs.items() for layer, rank in enumerate(spec.ranks) if rank}
    assert set().union(*moved) == adapted
    assert sum(map(len, moved)) == len(adapted)  # nobody is in two
    assert max(map(len, moved)) - min(map(len, moved)) <= 1
    depth = [max(0 if name != "lm_head" else 99, layer) for group in moved for name, layer in sorted(group, key=str)]
    assert len(depth) == len(adapted)
    if groups == 3:
        assert ("lm_head", 0) in moved[-1]


def test_more_groups_than_sites_is_an_error(toy):
    with pytest.raises(ConfigError, match="groups=99"):
        toy.cohort("tiny_lora", options={"groups": 99})


def test_a_conditioned_network_is_fitted_from_known_users(toy):
    """Cores that a planted network makes of traits: the fit finds it, and serves a user it has never seen."""
    options = {"traits": 3, "hidden": 8}
    cohort = toy.cohort("conditioned", options=options)
    planted = toy.shared(cohort)
    traits = jnp.asarray(np.random.default_rng(0).standard_normal((40, 1, 3)), jnp.float32)

    def cores(shared, traits_NxK):
        def at(name):
            h = jnp.tanh(jnp.einsum("...hk,nk->n...h", shared[name]["w1"], traits_NxK))
            return {"core": jnp.einsum("n...h,...hqr->n...qr", h, shared[name]["w2"])}

        return {name: at(name) for name in shared}

    blank = {name: leaves | {"w2": jnp.zeros_like(leaves["w2"])} for name, leaves in planted.items()}
    known = cores(planted, traits[:, 0])
    found = fitted(blank, {TIED: {"traits": traits}}, known, ridge=1e-7)
    newcomer = jnp.asarray([[0.3, -1.0, 0.5]], jnp.float32)
    for name, leaves in cores(found, newcomer).items():
        np.testing.assert_allclose(leaves["core"], cores(planted, newcomer)[name]["core"], atol=2e-3)
    own, want = (toy.forward(toy.weights, _bound(cohort, newcomer, shared), toy.x()) for shared in (found, planted))
    np.testing.assert_allclose(own, want, atol=5e-3)
    assert np.any(np.abs(want - toy.base(toy.x())) > 0.05)


def _bound(cohort, traits, shared):
    from popax.adapters.apply import bind

    return bind(cohort, {TIED: {"traits": traits}}, shared)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "tiny_lora", "options": {"projections": 0}}, "projections=0"),
        ({"method": "tiny_lora", "options": {"projection": 3}}, "projections=13"),
        ({"method": "lora", "options": {"b_rate": 0.0}}, "b_rate"),
        ({"method": "lora", "options": {"b_rate": "16"}}, "float"),
        ({"method": "svf", "options": {"renormalise": 1}}, "bool"),
        ({"method": "bias", "options": {"rank": 1}}, "none"),
        ({"method": "vera", "options": {"d_initial": 0.0}}, "d_initial"),
        ({"method": "lora_xs", "init": "pissa"}, "pissa"),
        ({"method": "ia3", "dropout": 0.1}, "dropout"),
        ({"method": "reft", "options": {"first": -1}}, "first=-1"),
        ({"method": "reft", "options": 3}, "options=3"),
    ],
)
def test_a_wrong_option_says_what_there_is(toy, settings, words):
    with pytest.raises(ConfigError, match=words):
        Cohort.of(AdapterConfig(**settings), toy.sites)


def test_options_are_part_of_what_a_cohort_is():
    plain, other = AdapterConfig(method="svf"), AdapterConfig(method="svf", options={"renormalise": True})
    assert "options" not in plain.to_dict()  # cohorts of older catalogs keep their names
    assert other.to_dict()["options"] == {"renormalise": True}
    assert AdapterConfig.from_dict(other.to_dict()) == other
    assert hash(other) != hash(plain)
