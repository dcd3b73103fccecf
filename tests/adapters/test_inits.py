"""Starts and shared bases of the methods, against other people's code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.base import AdapterConfig, TargetRule
from popax.adapters.cohort import Cohort
from popax.types import SiteInfo


def _one_site(d_in, d_out, **settings):
    info = SiteInfo(name="lm_head", d_in=d_in, d_out=d_out, layers=0, axes=("embed", "vocab"))
    return Cohort.of(AdapterConfig(targets=(TargetRule(pattern="lm_head"),), **settings), {"lm_head": info})


def test_lora_default_start_is_uniform_within_1_over_sqrt_d():
    """kaiming_uniform(a=sqrt 5): gain sqrt(2 / (1 + 5)), bound gain sqrt(3 / fan_in) = 1 / sqrt(fan_in)."""
    fan_in = 400
    leaves = _one_site(fan_in, 300, rank=64).init(jax.random.key(0))["lm_head"]
    gain = np.sqrt(2.0 / (1.0 + np.sqrt(5.0) ** 2))
    bound = gain * np.sqrt(3.0 / fan_in)
    a = np.asarray(leaves["a"])
    assert np.max(np.abs(a)) <= bound
    assert np.max(np.abs(a)) > 0.999 * bound
    np.testing.assert_allclose(np.std(a), bound / np.sqrt(3.0), rtol=0.02)
    assert not np.any(leaves["b"])


def test_lora_gaussian_start_has_std_1_over_the_layers_own_rank():
    info = SiteInfo(name="layers.mlp.up_proj", d_in=900, d_out=100, layers=3, axes=("embed", "ffw"))
    rules = (
        TargetRule(pattern=r"layers\.1\..*", rank=4),
        TargetRule(pattern=r"layers\.2\..*", rank=0),
        TargetRule(pattern=".*"),
    )
    cohort = Cohort.of(AdapterConfig(rank=16, init="gaussian", targets=rules), {info.name: info})
    a = np.asarray(cohort.init(jax.random.key(0))[info.name]["a"])
    np.testing.assert_allclose(np.std(a[0]), 1 / 16, rtol=0.05)
    np.testing.assert_allclose(np.std(a[1, :4]), 1 / 4, rtol=0.05)
    assert not np.any(a[1, 4:])
    assert not np.any(a[2])


@pytest.mark.parity
@pytest.mark.parametrize(("start", "init"), [(True, "default"), ("gaussian", "gaussian")])
def test_lora_starts_have_pefts_spread(start, init):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    model = torch.nn.ModuleDict({"proj": torch.nn.Linear(500, 400, bias=False)})
    config = peft.LoraConfig(r=32, target_modules=["proj"], init_lora_weights=start)
    theirs = peft.get_peft_model(model, config).base_model.model["proj"].lora_A["default"].weight.detach().numpy()
    ours = np.asarray(_one_site(500, 400, rank=32, init=init).init(jax.random.key(0))["lm_head"]["a"])
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(np.std(ours), np.std(theirs), rtol=0.03)
    np.testing.assert_allclose(np.max(np.abs(ours)), np.max(np.abs(theirs)), rtol=0.3)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (16, 16)])
def test_lora_xs_basis_is_the_truncated_svd(shape):
    """numpy's decomposition, up to the sign of each pair, which a's largest entry fixes; a^T b is the best rank-r W."""
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    cohort = _one_site(*shape, method="lora_xs", rank=5)
    basis = cohort.shared(lambda name: jnp.asarray(w))["lm_head"]
    u, s, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    a, b = np.asarray(basis["a"]), np.asarray(basis["b"])
    sign = np.sign(np.sum(a * u[:, :5].T, axis=1))[:, None]
    # Single precision over the smallest gap between two singular values, about 0.1 of the largest here.
    np.testing.assert_allclose(a, sign * u[:, :5].T, atol=1e-4)
    np.testing.assert_allclose(b, sign * s[:5, None] * vt[:5], atol=1e-3)
    assert np.all(a[np.arange(5), np.argmax(np.abs(a), axis=1)] > 0)
    np.testing.assert_allclose(a.T @ b, (u[:, :5] * s[:5]) @ vt[:5], atol=1e-4)


def test_lora_xs_basis_does_not_depend_on_the_svds_signs():
    """The basis of W and of a decomposition with other signs of the same W agree: -W has a's signs, and b's negated."""
    w = jnp.asarray(np.random.default_rng(1).standard_normal((12, 9)), jnp.float32)
    cohort = _one_site(12, 9, method="lora_xs", rank=3)
    plus, minus = (cohort.shared(lambda name, sign=sign: sign * w)["lm_head"] for sign in (1.0, -1.0))
    np.testing.assert_allclose(plus["a"], minus["a"], atol=1e-5)
    np.testing.assert_allclose(plus["b"], -minus["b"], atol=1e-5)


def test_lora_xs_gaussian_start_is_the_papers():
    core = np.asarray(
        _one_site(300, 300, method="lora_xs", rank=100, init="gaussian").init(jax.random.key(0))["lm_head"]["core"]
    )
    assert core.shape == (100, 100)
    np.testing.assert_allclose(np.std(core), 1e-5, rtol=0.05)
    assert _one_site(300, 300, method="lora_xs", rank=100).num_params == 100 * 100


@pytest.mark.parametrize("init", ["pissa", "milora", "olora", "olora_tail", "mica"])
def test_starts_from_the_bases_own_factors(init):
    """What users share, against numpy: the product A0^T B0; a fresh adapter is zeros."""
    w = np.random.default_rng(2).standard_normal((9, 7)).astype(np.float32)
    cohort = _one_site(9, 7, rank=3, alpha=6.0, init=init)
    shared = {name: np.float64(leaf) for name, leaf in cohort.shared(lambda name: jnp.asarray(w))["lm_head"].items()}
    assert not any(np.any(leaf) for leaf in cohort.init(jax.random.key(0))["lm_head"].values())
    u, s, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    if init == "mica":  # one span of the smallest vectors on the output's side
        np.testing.assert_allclose(shared["b"].T @ shared["b"], vt[-3:].T @ vt[-3:], atol=1e-4)
        return
    q, r = np.linalg.qr(w.T.astype(np.float64))
    want = {
        "pissa": (u[:, :3] * s[:3]) @ vt[:3] / 2.0,  # the scale is alpha / rank = 2
        "milora": (u[:, -3:] * s[-3:]) @ vt[-3:] / 2.0,
        "olora": (q[:, :3] @ r[:3]).T,
        "olora_tail": u[:, -3:] @ vt[-3:],
    }[init]
    np.testing.assert_allclose(shared["a"].T @ shared["b"], want, atol=1e-4)
