"""The stacked op's kernels, interpreted, against sums in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popax.kernels import triton
from popax.kernels.stacked_lora import pallas_gpu, pallas_tpu

DTYPES = ("float32", "bfloat16")


def _tpu_blocks(tokens, d_in, d_out):
    """Several tiles and several column blocks wherever the shape allows."""
    column = lambda size: 128 if size % 128 == 0 else size  # noqa: E731
    return pallas_tpu.Blocks(128 if tokens > 128 else tokens, column(d_in), column(d_out))


def _gpu_blocks(tokens, d_in, d_out):
    return triton.Blocks(tile=1 if tokens == 1 else 16, block=32)


KERNELS = {"tpu": (pallas_tpu, _tpu_blocks), "gpu": (pallas_gpu, _gpu_blocks)}


def _operands(lora_math, seed, shape, dtype, with_y):
    users, tokens, d_in, d_out, rank = shape
    shapes = ((users, tokens, d_in), (users, rank, d_in), (users, rank, d_out), (users, tokens, d_out))
    x, a, b, g = (lora_math.normal(seed + index, each, dtype) for index, each in enumerate(shapes))
    y = lora_math.normal(seed + 9, shapes[-1], dtype) if with_y else None
    return x, a, b, jnp.linspace(0.5, 2.0, users, dtype=jnp.float32), g, y


def _run(kernel, x, a, b, scale, g, y):
    module, blocks_of = KERNELS[kernel]
    options = {"blocks": blocks_of(x.shape[1], x.shape[2], b.shape[2]), "interpret": True}
    out, h = module.forward(x, a, b, scale, y, **options)
    return out, h, module.backward(g, x, h, a, b, scale, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@given(
    shape=st.tuples(
        st.integers(1, 3),
        st.integers(1, 140),
        st.sampled_from((40, 128, 256)),
        st.sampled_from((24, 128, 384)),
        st.integers(1, 128),
    ),
    dtype=st.sampled_from(DTYPES),
    with_y=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=8, deadline=None)
def test_forward_and_backward_against_the_sums(lora_math, kernel, shape, dtype, with_y, seed):
    x, a, b, scale, g, y = _operands(lora_math, seed, shape, dtype, with_y)
    out, h, gradients = _run(kernel, x, a, b, scale, g, y)
    users, tokens, d_in, d_out, rank = shape
    assert (out.shape, h.shape, out.dtype) == ((users, tokens, d_out), (users, rank, tokens), x.dtype)
    terms = d_in + d_out + rank + tokens
    for user in range(users):
        operands, size = (x[user], a[user], b[user]), float(scale[user])
        sizes = [np.abs(np.asarray(each, np.float64)) for each in operands]
        base = np.zeros((tokens, d_out)) if y is None else np.asarray(y[user], np.float64)
        want = lora_math.delta(*operands, size) + base
        lora_math.assert_close(out[user], want, lora_math.delta(*sizes, size) + np.abs(base), dtype, terms)
        wants = lora_math.vjp(g[user], *operands, size)
        magnitudes = lora_math.vjp(np.abs(np.asarray(g[user], np.float64)), *sizes, size)
        for got, true, magnitude in zip(gradients, wants, magnitudes, strict=True):
            lora_math.assert_close(got[user], true, magnitude, dtype, terms)


@pytest.mark.parametrize("rank", [1, 2, 8, 64, 128])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_users_nan_stays_with_them(lora_math, kernel, rank):
    """Invariant 2: bitwise, in results and gradients, with ragged token tiles."""
    x, a, b, scale, g, y = _operands(lora_math, rank, (3, 133, 128, 128, rank), "float32", True)
    clean = jax.tree.leaves(_run(kernel, x, a, b, scale, g, y))
    poisoned = jax.tree.leaves(_run(kernel, x.at[1].set(jnp.nan), a, b, scale, g.at[1, -1].set(jnp.nan), y))
    for before, after in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(np.asarray(before)[[0, 2]], np.asarray(after)[[0, 2]])
    assert all(np.isnan(np.asarray(leaf)[1]).any() for leaf in poisoned)


@pytest.mark.parametrize("module", [pallas_gpu, pallas_tpu])
def test_float64_is_refused_by_name(module):
    with jax.enable_x64(True):
        x = jnp.zeros((1, 2, 4), jnp.float64)
        with pytest.raises(NotImplementedError, match="float64"):
            module.forward(x, x[:, :1], x[:, :1], jnp.ones((1,)))


def test_what_does_not_fit_vector_memory_says_how_much():
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 64, 28672), (1, 64, 8192), (1, 128, 64))]
    g, x, h = operands
    a, b = (jax.ShapeDtypeStruct((1, 128, columns), jnp.bfloat16) for columns in (8192, 28672))
    with pytest.raises(NotImplementedError, match=r"rank 128, 8192 -> 28672, need \d+ of \d+ bytes"):
        jax.eval_shape(pallas_tpu.backward, g, x, h, a, b, jax.ShapeDtypeStruct((1,), jnp.float32))
