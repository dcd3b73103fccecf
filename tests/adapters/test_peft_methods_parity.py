"""Methods and starts at equal weights against peft, and which one popax follows where peft and a paper differ."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort, scales
from popax.types import SiteInfo

peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
pytestmark = pytest.mark.parity

D, F, R = 12, 9, 3
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@dataclasses.dataclass
class Linear:
    """One linear map of torch's, and the same as a site of popax."""

    module: "torch.nn.Linear"

    @property
    def w_DxF(self):
        return jnp.asarray(self.module.weight.detach().numpy().T)

    @property
    def bias_F(self):
        return jnp.asarray(self.module.bias.detach().numpy())

    def cohort(self, **settings) -> Cohort:
        info = SiteInfo(name="proj", d_in=D, d_out=F, layers=0, axes=("embed", "ffw"))
        return Cohort.of(AdapterConfig(targets="proj", **{"rank": R, "alpha": 6.0, **settings}), {"proj": info})

    def shared(self, cohort):
        return cohort.shared(lambda site: self.w_DxF, lambda site: self.bias_F)

    def output(self, cohort, state, x, shared=None):
        shared = self.shared(cohort) if shared is None else shared
        state = cohort.refreshed({"proj": state}, shared, lambda site: self.w_DxF)
        seen, y = cohort.spread(state)["proj"], x @ self.w_DxF + self.bias_F[None]
        scale = scales(cohort.specs["proj"])
        return cohort.method.delta(seen, shared.get("proj", {}), scale, x, y, lambda features: features)


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return Linear(torch.nn.Linear(D, F))


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(1).standard_normal((5, D)), jnp.float32)


def wrapped(linear, config):
    """(peft's layer on a copy of the module, its output on numpy's x)."""
    module = torch.nn.Linear(D, F)
    module.load_state_dict(linear.module.state_dict())
    model = peft.get_peft_model(torch.nn.ModuleDict({"proj": module}), config)
    layer = model.base_model.model["proj"]

    def run(x):
        with torch.no_grad():
            return layer(torch.tensor(np.asarray(x))).numpy()

    return layer, run


def fill(tensor, seed, spread=0.3, around=0.0):
    """Random values in a parameter of torch's, and the same for jax."""
    values = around + spread * np.random.default_rng(seed).standard_normal(tuple(tensor.shape))
    tensor.data = torch.tensor(values, dtype=torch.float32)
    return jnp.asarray(values, jnp.float32)


def test_dora(linear, x):
    layer, run = wrapped(linear, peft.LoraConfig(r=R, lora_alpha=6, target_modules=["proj"], use_dora=True))
    a, b = fill(layer.lora_A["default"].weight, 1), fill(layer.lora_B["default"].weight, 2)
    m = fill(layer.lora_magnitude_vector["default"].weight, 3, 0.1, 1.0)
    cohort = linear.cohort(method="dora")
    size = jnp.linalg.norm(linear.w_DxF, axis=0)
    state = {"a": a, "b": b.T, "m": m.reshape(-1) - size, "n": jnp.zeros(F)}
    np.testing.assert_allclose(linear.output(cohort, state, x), run(x), **TOLERANCE)


def test_vera(linear, x):
    config = peft.VeraConfig(r=R, target_modules=["proj"], save_projection=True)
    layer, run = wrapped(linear, config)
    a, b = fill(layer.vera_A["default"], 1), fill(layer.vera_B["default"], 2)
    d, scaled = fill(layer.vera_lambda_d["default"], 3), fill(layer.vera_lambda_b["default"], 4)
    cohort = linear.cohort(method="vera")
    own = linear.output(cohort, {"d": d, "b": scaled}, x, {"proj": {"a": a, "b": b.T}})
    np.testing.assert_allclose(own, run(x), **TOLERANCE)


def test_veras_shared_factors_have_pefts_spread():
    """Kaiming-uniform over the widest matrices; a fresh d is 0.1, a fresh b zero."""
    layer, _ = wrapped(Linear(torch.nn.Linear(D, F)), peft.VeraConfig(r=512, target_modules=["proj"]))
    info = SiteInfo(name="proj", d_in=D, d_out=F, layers=0, axes=("embed", "ffw"))
    # A rank beyond the site's: only the shared factors are looked at, which a config never makes so wide.
    cohort = Cohort.of(AdapterConfig(method="vera", rank=F, targets="proj"), {"proj": info})
    spec = dataclasses.replace(cohort.sites[0], ranks=(512,))
    wide = Cohort(cohort.config, (spec,))
    shared = wide.shared(lambda site: jnp.zeros((D, F)))["proj"]
    for ours, theirs in ((shared["a"], layer.vera_A["default"]), (shared["b"], layer.vera_B["default"])):
        np.testing.assert_allclose(np.std(ours), theirs.std().item(), rtol=0.05)
        np.testing.assert_allclose(np.max(np.abs(ours)), theirs.abs().max().item(), rtol=0.02)
    fresh = cohort.init(jax.random.key(0))["proj"]
    np.testing.assert_array_equal(fresh["d"], layer.vera_lambda_d["default"].detach().numpy()[:F])
    assert not np.any(fresh["b"])
    assert not layer.vera_lambda_b["default"].detach().numpy().any()


def test_ia3(linear, x):
    layer, run = wrapped(linear, peft.IA3Config(target_modules=["proj"], feedforward_modules=[]))
    gain = fill(layer.ia3_l["default"], 1, 0.3, 1.0).reshape(-1)
    own = linear.output(linear.cohort(method="ia3"), {"l": gain - 1.0}, x)
    np.testing.assert_allclose(own, run(x), **TOLERANCE)


def test_ia3_of_a_feed_forward_is_a_gain_on_the_up_projection():
    """peft scales what enters down_proj; popax what leaves up_proj. They are one map of act(gate) * up."""
    rng = np.random.default_rng(0)
    gate, up, gain, x = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((D, F), (D, F), (F,), (5, D))
    )
    module = torch.nn.Linear(F, D, bias=False)
    config = peft.IA3Config(target_modules=["proj"], feedforward_modules=["proj"])
    model = peft.get_peft_model(torch.nn.ModuleDict({"proj": module}), config)
    layer = model.base_model.model["proj"]
    layer.ia3_l["default"].data = torch.tensor(np.asarray(gain))[None]
    down = jnp.asarray(module.weight.detach().numpy().T)
    with torch.no_grad():
        theirs = layer(torch.tensor(np.asarray(jax.nn.silu(x @ gate) * (x @ up)))).numpy()
    info = SiteInfo(name="proj", d_in=D, d_out=F, layers=0, axes=("embed", "ffw"))
    cohort = Cohort.of(AdapterConfig(method="ia3", targets="proj"), {"proj": info})
    lifted = cohort.method.delta({"l": gain - 1.0}, {}, scales(cohort.specs["proj"]), x, x @ up, None)
    np.testing.assert_allclose((jax.nn.silu(x @ gate) * lifted) @ down, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("equal", [True, False])
def test_tiny_lora_follows_the_paper_where_peft_does_not(linear, x, equal):
    """The paper's U S (sum v P) V^T; peft has a root of S on each side. Equal where the top singular values are."""
    u, s, vt = np.linalg.svd(linear.module.weight.detach().numpy(), full_matrices=False)
    s[:2] = s[0] if equal else (s[0], s[0] / 4)
    linear.module.weight.data = torch.tensor((u * s) @ vt)
    layer, run = wrapped(linear, peft.TinyLoraConfig(r=2, u=5, target_modules=["proj"]))
    v = np.random.default_rng(3).standard_normal(5).astype(np.float32)
    for parameter in layer.tinylora_v["default"].values():
        parameter.data = torch.tensor(v)
    root = jnp.asarray(np.sqrt(s[:2]), jnp.float32)[:, None]
    a = jnp.asarray(layer.tinylora_A["default"].numpy()) / root
    b = jnp.asarray(layer.tinylora_B["default"].numpy()).T * root
    shared = {"proj": {"a": a, "b": b, "p": jnp.asarray(layer.tinylora_P["default"].numpy())}}
    cohort = linear.cohort(method="tiny_lora", rank=2, options={"projections": 5})
    seen = {"v": jnp.asarray(v)[None]}
    y = x @ linear.w_DxF + linear.bias_F[None]
    own = cohort.method.delta(
        cohort.spread({"tied": seen})["proj"], shared["proj"], jnp.float32(1), x, y, lambda features: features
    )
    theirs = run(x)
    assert np.max(np.abs(theirs - np.asarray(y))) > 0.1
    if equal:
        np.testing.assert_allclose(own, theirs, rtol=1e-4, atol=1e-4)
    else:
        assert np.max(np.abs(np.asarray(own) - theirs)) > 0.05


@pytest.mark.parametrize(("start", "row"), [("pissa", "pissa"), ("olora", "olora")])
def test_starts_that_move_pefts_base_leave_popaxs_alone(linear, x, start, row):
    """peft subtracts s B0 A0 from the weight; popax's users share the same A0 and B0, and the maps are equal."""
    layer, run = wrapped(linear, peft.LoraConfig(r=R, lora_alpha=6, target_modules=["proj"], init_lora_weights=start))
    assert np.max(np.abs(layer.base_layer.weight.detach().numpy() - linear.module.weight.detach().numpy())) > 0.01
    a0, b0 = (jnp.asarray(getattr(layer, name)["default"].weight.detach().numpy()) for name in ("lora_A", "lora_B"))
    cohort = linear.cohort(init=row)
    shared = linear.shared(cohort)["proj"]
    np.testing.assert_allclose(shared["a"].T @ shared["b"], (b0 @ a0).T, rtol=1e-4, atol=1e-4)
    a, b = fill(layer.lora_A["default"].weight, 1), fill(layer.lora_B["default"].weight, 2)
    own = linear.output(cohort, {"a": a - a0, "b": (b - b0).T}, x, {"proj": {"a": a0, "b": b0.T}})
    np.testing.assert_allclose(own, run(x), rtol=1e-4, atol=1e-4)


def test_mica(linear, x):
    layer, run = wrapped(linear, peft.LoraConfig(r=R, lora_alpha=6, target_modules=["proj"], init_lora_weights="mica"))
    b0 = jnp.asarray(layer.lora_B["default"].weight.detach().numpy())
    cohort = linear.cohort(init="mica")
    shared = linear.shared(cohort)["proj"]["b"]
    # One span of the smallest left singular vectors, whatever their order and signs.
    np.testing.assert_allclose(shared.T @ shared, b0 @ b0.T, atol=1e-4)
    a = fill(layer.lora_A["default"].weight, 1)
    own = linear.output(cohort, {"a": a}, x, {"proj": {"b": b0.T}})
    np.testing.assert_allclose(own, run(x), **TOLERANCE)
