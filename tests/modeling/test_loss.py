"""The nats of targets under a head: without logits where it is everybody's, with them where it is not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.modeling.config import ModelConfig
from popax.modeling.loss import cross_entropy
from popax.modeling.model import Model
from popax.types import NO_ADAPT

CONFIG = ModelConfig(
    vocab_size=40, embed_dim=16, ffw_dim=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, max_seq_len=16
)


@dataclasses.dataclass(frozen=True)
class Scaled:
    """An Adapt that scales the output of one site, outside the layers."""

    virtual_tokens = 0
    site: str
    factor: float

    @property
    def layers(self):
        return NO_ADAPT

    @property
    def outer(self):
        return self

    def __call__(self, x, ys):
        del x
        return {site: y * self.factor if site == self.site else y for site, y in ys.items()}

    def hidden(self, site, x_BxTxD, positions_BxT, cache):
        del positions_BxT
        return (self(x_BxTxD, {site: x_BxTxD})[site] if self.adapts(site) else x_BxTxD), cache

    def adapts(self, site):
        return site == self.site


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request):
    model = Model(dataclasses.replace(CONFIG, tied_embeddings=request.param))
    params = model.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 5, 16)) * 10
    return model, params, x, jax.random.randint(jax.random.key(2), (2, 5), 0, 40)


def test_both_roads_are_the_same_function(base):
    model, params, x, targets = base
    whole = lambda x: jnp.sum(cross_entropy(model.logits(params, x), targets))  # noqa: E731
    for frozen in (True, False):
        nats = lambda x, frozen=frozen: jnp.sum(model.token_nll(params, x, targets, frozen=frozen))  # noqa: E731
        for got, want in zip(jax.value_and_grad(nats)(x), jax.value_and_grad(whole)(x), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_only_a_head_that_is_not_frozen_has_a_gradient(base):
    model, params, x, targets = base
    loss = lambda params, frozen: jnp.sum(model.token_nll(params, x, targets, frozen=frozen))  # noqa: E731
    gradient = jax.grad(loss)(params, False)
    head = gradient["embed"]["embedding"] if model.config.tied_embeddings else gradient["lm_head"]["kernel"]
    assert np.any(np.asarray(head))
    with pytest.raises(NotImplementedError, match="no gradient for the head's weight"):
        jax.grad(loss)(params, True)


def test_an_adapter_at_the_head_is_asked():
    model = Model(CONFIG)
    params, x = model.init(jax.random.key(0)), jnp.ones((3, 16))
    targets, adapt = jnp.asarray([1, 2, 3]), Scaled("lm_head", 3.0)
    nats = model.token_nll(params, x, targets, adapt)
    np.testing.assert_allclose(nats, cross_entropy(3.0 * model.logits(params, x), targets), rtol=1e-6)
    assert np.all(np.asarray(nats) != np.asarray(model.token_nll(params, x, targets)))
    elsewhere = model.token_nll(params, x, targets, Scaled("another", 3.0))
    np.testing.assert_array_equal(elsewhere, model.token_nll(params, x, targets))


def _shapes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (each.aval.shape for each in eqn.outvars)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _shapes(inner)


def test_the_logits_of_a_large_vocabulary_do_not_exist():
    """Several users' rows under one head: as much as a chunk of logits and no more, in the loss and its gradient."""
    model = Model(dataclasses.replace(CONFIG, vocab_size=1 << 17))
    x, targets = (jax.ShapeDtypeStruct((4, 2, 512, *more), kind) for more, kind in (((16,), "float32"), ((), "int32")))

    def step(params, x, targets, frozen):
        one = lambda x, targets: jnp.sum(model.token_nll(params, x, targets, frozen=frozen))  # noqa: E731
        return jax.vmap(jax.value_and_grad(one))(x, targets)

    def most(frozen):
        traced = jax.make_jaxpr(lambda *operands: step(*operands, frozen))(model.abstract(), x, targets)
        return max(int(np.prod(shape)) for shape in _shapes(traced.jaxpr))

    assert most(frozen=False) == 4 * 2 * 512 << 17
    assert most(frozen=True) <= 1 << 27
