"""Every form of the op, the TPU kernel interpreted, against log-softmax in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popax.kernels.cross_entropy import pallas_tpu, reference

DTYPES = st.sampled_from([("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])  # x, w
# XLA in one chunk, in some, and row by row; the kernel in several tiles of rows and of the vocabulary.
FORMS = (
    *((reference, {"most_logits": most}) for most in (1 << 27, 20000, 1)),
    *((pallas_tpu, {"blocks": pallas_tpu.Blocks(*each), "interpret": True}) for each in ((128, 128), (256, 384))),
)
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8}


def _operands(seed, shape, dtypes, vocab_first, popularity="uniform"):
    """Rows that look for the same few targets meet them in the same blocks."""
    (rows, embed, vocab), rng = shape, np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((rows, embed)), dtypes[0])
    w = jnp.asarray(rng.standard_normal((vocab, embed) if vocab_first else (embed, vocab)), dtypes[1])
    target = {
        "uniform": lambda: rng.integers(0, vocab, rows),
        "zipf": lambda: np.minimum(rng.zipf(1.3, rows), vocab) - 1,
        "identical": lambda: np.full(rows, vocab - 1),
    }[popularity]()
    return x, w, jnp.asarray(target, jnp.int32)


def _oracle(x, w_VxD, target):
    """(nats, gradient, the sum of its |terms|): nats = log(1 + the sum of exp(l_v - l_target) over the others)."""
    rows, logits = np.arange(len(x)), x @ w_VxD.T
    others = np.exp(logits - logits.max(1, keepdims=True))
    total = others.sum(1)
    others[rows, target] = 0.0
    relative = np.exp(logits - logits[rows, target][:, None])
    relative[rows, target] = 0.0
    weight = others / total[:, None]
    weight[rows, target] = -weight.sum(1)
    return np.log1p(relative.sum(1)), weight @ w_VxD, np.abs(weight) @ np.abs(w_VxD)


def _assert_right(outputs, x, w, target, vocab_first):
    """Within what float32 sums make of the logits, and a few roundings of weights and result in x's dtype."""
    nats, gradient = outputs
    assert (nats.dtype, gradient.dtype) == (jnp.float32, x.dtype)
    w = w.astype(x.dtype)  # the form multiplies in x's dtype
    x64, w64 = np.asarray(x, np.float64), np.asarray(w if vocab_first else w.T, np.float64)
    want_nats, want_gradient, magnitude = _oracle(x64, w64, np.asarray(target))
    unit = ROUNDOFF["float32"]
    logit_error = (x.shape[1] + 4) * unit * (np.abs(x64) @ np.abs(w64).T).max(1)
    terms = len(w64) * unit
    worst = np.abs(np.asarray(nats, np.float64) - want_nats) / (2 * logit_error + (terms + 8 * unit) * (1 + want_nats))
    assert worst.max() <= 1.0, f"nats are off by {worst.max():.2f} of the bound"
    bound = (4 * logit_error + 2 * terms + 4 * ROUNDOFF[x.dtype.name])[:, None] * magnitude + 1e-30
    worst = np.abs(np.asarray(gradient, np.float64) - want_gradient) / bound
    assert worst.max() <= 1.0, f"the gradient is off by {worst.max():.2f} of the bound"


@pytest.mark.parametrize(("module", "options"), FORMS)
@given(
    shape=st.tuples(st.integers(1, 300), st.sampled_from((1, 24, 128)), st.integers(2, 700)),
    dtypes=DTYPES,
    vocab_first=st.booleans(),
    popularity=st.sampled_from(("uniform", "zipf", "identical")),
    seed=st.integers(0, 99),
)
@settings(max_examples=8, deadline=None)
def test_nats_and_gradient_against_the_sums(module, options, shape, dtypes, vocab_first, popularity, seed):
    """Rows and vocabularies of any size; what lies beyond the last block is NaN when interpreted."""
    x, w, target = _operands(seed, shape, dtypes, vocab_first, popularity)
    outputs = jax.jit(functools.partial(module.nats_and_gradient, vocab_first=vocab_first, **options))(x, w, target)
    _assert_right(outputs, x, w, target, vocab_first)
    (alone,) = jax.jit(functools.partial(module.nats, vocab_first=vocab_first, **options))(x, w, target)
    np.testing.assert_allclose(alone, outputs[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("vocab_first", [True, False])
@pytest.mark.parametrize(("module", "options"), FORMS[1:4])
def test_a_certain_target_keeps_its_gradient(module, options, vocab_first, dtype):
    """p -> 1: nats and gradient vanish like 1 - p ~ 1e-6, and are relatively as exact as everywhere.

    A p rounded to bfloat16, or 1 - p in float32, is off by the gradient itself and more.
    """
    rows, embed, vocab = 140, 128, 300
    x, w, target = _operands(0, (rows, embed, vocab), (dtype, dtype), True)
    x = (w[target].astype(jnp.float32) * 0.15 + x.astype(jnp.float32) * 0.02).astype(dtype)
    w = w if vocab_first else w.T
    outputs = module.nats_and_gradient(x, w, target, vocab_first=vocab_first, **options)
    _assert_right(outputs, x, w, target, vocab_first)
    nats, gradient = (np.asarray(each, np.float64) for each in outputs)
    want, want_gradient, _ = _oracle(
        np.asarray(x, np.float64), np.asarray(w if vocab_first else w.T, np.float64), np.asarray(target)
    )
    assert np.median(want) < 1e-5
    np.testing.assert_allclose(nats, want, rtol=1e-3)
    size = np.linalg.norm(want_gradient, axis=1)
    assert np.max(np.linalg.norm(gradient - want_gradient, axis=1) / size) < 16 * ROUNDOFF[dtype] + 1e-4


@pytest.mark.parametrize("vocab_first", [True, False])
def test_a_rows_nan_stays_in_it(vocab_first):
    """Invariant 2: bitwise, within one tile."""
    x, w, target = _operands(1, (150, 128, 300), ("float32", "float32"), vocab_first)
    options = {"vocab_first": vocab_first, "blocks": pallas_tpu.Blocks(128, 128), "interpret": True}
    clean = pallas_tpu.nats_and_gradient(x, w, target, **options)
    poisoned = pallas_tpu.nats_and_gradient(x.at[70].set(jnp.nan), w, target, **options)
    for before, after in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(np.delete(before, 70, axis=0), np.delete(after, 70, axis=0))
        assert np.isnan(np.asarray(after)[70]).all()


def test_a_row_does_not_know_its_tile():
    """Invariant 1 for the kernel: the same rows among others, in another place of a tile."""
    x, w, target = _operands(2, (200, 128, 300), ("float32", "float32"), True)
    options = {"vocab_first": True, "blocks": pallas_tpu.Blocks(128, 128), "interpret": True}
    together = pallas_tpu.nats_and_gradient(x, w, target, **options)
    alone = pallas_tpu.nats_and_gradient(x[37:], w, target[37:], **options)
    for got, want in zip(alone, together, strict=True):
        np.testing.assert_allclose(got, want[37:], rtol=1e-6, atol=1e-6)


def test_float64_is_refused_by_name():
    with jax.enable_x64(True):
        x = jnp.zeros((2, 4), jnp.float64)
        with pytest.raises(NotImplementedError, match="float64"):
            pallas_tpu.nats(x, x, jnp.zeros((2,), jnp.int32), vocab_first=True)


def test_what_does_not_fit_vector_memory_says_how_much():
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((512, 16384), (16384, 1024)))
    target = jax.ShapeDtypeStruct((512,), jnp.int32)
    with pytest.raises(NotImplementedError, match=r"16384 columns need \d+ of \d+ bytes of VMEM"):
        jax.eval_shape(lambda *operands: pallas_tpu.nats_and_gradient(*operands, vocab_first=False), x, w, target)
