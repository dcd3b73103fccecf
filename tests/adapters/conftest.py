"""A small scanned model with popax's sites, and adapters on it that have really been trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from popax.adapters.apply import bind
from popax.adapters.base import ALL_LINEAR, AdapterConfig, TargetRule
from popax.adapters.cohort import Cohort
from popax.adapters.table import METHODS, ROWS
from popax.types import NO_ADAPT, SiteInfo

LAYERS = 3
OPTIMIZER = optax.adam(0.05)
# Both blocks of a layer have the same widths: an operation is compiled by its shape, and tests here wait for compiling.
DIMS = {
    "layers.attn.q_proj": (12, 8, ("embed", "heads")),
    "layers.attn.o_proj": (8, 12, ("heads", "embed")),
    "layers.mlp.up_proj": (12, 8, ("embed", "ffw")),
    "layers.mlp.down_proj": (8, 12, ("ffw", "embed")),
    "lm_head": (12, 17, ("embed", "vocab")),
}
SITES = {
    name: SiteInfo(name=name, d_in=d_in, d_out=d_out, layers=0 if name == "lm_head" else LAYERS, axes=axes)
    for name, (d_in, d_out, axes) in DIMS.items()
}
HIDDEN = SiteInfo(name="layers.out", d_in=12, d_out=12, layers=LAYERS, axes=("embed", "embed"), kind="hidden")
# Of a method for hidden states: mixed ranks, and a layer left out.
MIXED_HIDDEN = (
    TargetRule(pattern=r"layers\.1\.out", rank=2),
    TargetRule(pattern=r"layers\.2\.out", rank=0),
    TargetRule(pattern=r"layers\.out"),
)
# Of virtual tokens: as many as the cohort's rank, in front of the text.
PROMPT = (TargetRule(pattern="embed"),)
EMBEDDING = SiteInfo(name="embed", d_in=30, d_out=12, layers=0, axes=("vocab", "embed"), kind="embedding")
TOKENS = (-1, -3, 0, 0, 0)  # of `x`
MIXED = (
    TargetRule(pattern=r"layers\.1\.attn\..*", rank=2, alpha=3.0),
    TargetRule(pattern=r"layers\.2\.mlp\.up_proj", rank=0),
    TargetRule(pattern="lm_head", rank=3),
    TargetRule(pattern=ALL_LINEAR),
)


@dataclasses.dataclass(frozen=True)
class Toy:
    """Two residual blocks a layer, scanned, and a head; weights: site -> [L, D, F] or [D, F]; biases: [L, F] or [F]."""

    sites: dict
    mixed: tuple
    weights: dict
    biases: dict

    def forward(self, weights, adapt, x_BxTxD, biases=None):
        return _forward(self, weights, adapt, x_BxTxD, biases)

    def _forward(self, weights, adapt, x_BxTxD, biases=None):
        biases = self.biases if biases is None else biases
        positions_BxT = jnp.broadcast_to(jnp.arange(x_BxTxD.shape[1])[None], x_BxTxD.shape[:2])

        def layer(h, operands):
            (own, bias), site_fn = operands
            for inner, outer in (("attn.q_proj", "attn.o_proj"), ("mlp.up_proj", "mlp.down_proj")):
                inner, outer = f"layers.{inner}", f"layers.{outer}"
                hidden = jnp.tanh(site_fn(h, {inner: _affine(h, own[inner], bias[inner])})[inner])
                h = h + site_fn(hidden, {outer: _affine(hidden, own[outer], bias[outer])})[outer]
            return site_fn.hidden("layers.out", h, positions_BxT, None)

        outer = ("lm_head", "embed")
        stacked = [{name: each for name, each in tree.items() if name not in outer} for tree in (weights, biases)]
        tokens_BxT = jnp.broadcast_to(jnp.asarray(TOKENS)[None, : x_BxTxD.shape[1]], x_BxTxD.shape[:2])
        h, _ = jax.lax.scan(layer, adapt.outer.embedded(x_BxTxD, tokens_BxT), (stacked, adapt.layers))
        return adapt.outer(h, {"lm_head": _affine(h, weights["lm_head"], biases["lm_head"])})["lm_head"]

    def base(self, x):
        return self.forward(self.weights, NO_ADAPT, x)

    def op_by_op(self, adapt, x_BxTxD):
        """Every operation compiled by itself: XLA fuses whole programs differently, and equal bits are then luck."""
        with jax.disable_jit():
            return self._forward(self.weights, adapt, x_BxTxD)

    def x(self, seed=0, batch=4, tokens=5):
        return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, tokens, 12)), jnp.float32)

    def cohort(self, row="lora", **settings):
        """row: of the table, by its name in ROWS."""
        config = ROWS[row]
        targets = {"linear": self.mixed, "hidden": MIXED_HIDDEN, "embedding": PROMPT}[METHODS[config.method].kind]
        settings = {"method": config.method, "init": config.init, "options": config.options} | settings
        return Cohort.of(AdapterConfig(**({"rank": 4, "alpha": 8.0, "targets": targets} | settings)), self.sites)

    def init(self, cohort, key):
        return _init(cohort, key)

    def shared(self, cohort):
        return _shared(self, cohort)

    def run(self, cohort, adapter, x, **options):
        return self.forward(self.weights, bind(cohort, adapter, self.shared(cohort), **options), x)

    def trained(self, cohort, seed=0, steps=3):
        """A fresh adapter after a few Adam steps on a random regression: non-zero where training makes it so."""
        self.shared(cohort)  # outside of the jitted step, which would otherwise leave its tracers in the cache
        return _trained(self, cohort, seed, steps)

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def _affine(x_BxTxD, w_DxF, bias_F):
    return x_BxTxD @ w_DxF + bias_F[None, None]


# One compilation for all tests of a cohort: most of this folder's time is compiling.
_forward = jax.jit(Toy._forward, static_argnums=0)
_init = jax.jit(Cohort.init, static_argnums=0)


@functools.cache
def _shared(toy, cohort):
    return cohort.shared(toy.weights.__getitem__, toy.biases.__getitem__)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train_step(toy, cohort, adapter, state, x, target):
    loss = lambda adapter: jnp.mean((toy.run(cohort, adapter, x) - target) ** 2)  # noqa: E731
    with jax.numpy_dtype_promotion("standard"):  # optax's own bias correction is float ** int32
        updates, state = OPTIMIZER.update(jax.grad(loss)(adapter), state, adapter)
    adapter = optax.apply_updates(adapter, updates)
    return cohort.refreshed(adapter, toy.shared(cohort), toy.weights.__getitem__), state


@functools.cache
def _trained(toy, cohort, seed, steps):
    target = jnp.asarray(np.random.default_rng(seed + 1).standard_normal((4, 5, 17)), jnp.float32)
    adapter = toy.init(cohort, jax.random.key(seed))
    state = OPTIMIZER.init(adapter)
    for _ in range(steps):
        adapter, state = _train_step(toy, cohort, adapter, state, toy.x(seed), target)
    return adapter


@pytest.fixture(scope="session")
def toy():
    rng = np.random.default_rng(5)
    weights, biases = {}, {}
    for name, info in SITES.items():
        lead = (info.layers,) if info.layers else ()
        weight = rng.standard_normal((*lead, info.d_in, info.d_out)) / np.sqrt(info.d_in)
        weights[name] = jnp.asarray(weight, jnp.float32)
        # Some of the sites have a bias that is not zero.
        bias = 0.1 * rng.standard_normal((*lead, info.d_out)) * (name in ("layers.mlp.up_proj", "lm_head"))
        biases[name] = jnp.asarray(bias, jnp.float32)
    weights["embed"], biases["embed"] = jnp.asarray(rng.standard_normal((30, 12)), jnp.float32), jnp.zeros(12)
    return Toy(
        sites=SITES | {site.name: site for site in (HIDDEN, EMBEDDING)}, mixed=MIXED, weights=weights, biases=biases
    )
