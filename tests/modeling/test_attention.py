"""Attention against a softmax written out in numpy, head by head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.modeling.attention import cache_mask, causal_attention, dot_product_attention, packed_mask


def written_out(q, k, v, mask) -> np.ndarray:
    batch, _, heads, dim = q.shape
    out = np.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // k.shape[2])
            scores = np.where(mask[b], q[b, :, h] @ k[b, :, kv].T / np.sqrt(dim), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, :, h] = weights / weights.sum(-1, keepdims=True) @ v[b, :, kv]
    return out


def draw(length: int, heads: int, kv_heads: int, dim: int = 8):
    rng = np.random.default_rng(length)
    shapes = ((2, length, heads, dim), (2, length, kv_heads, dim), (2, length, kv_heads, dim))
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


# One strip, one and a little, several with a short last one, and wider strips than 64.
@pytest.mark.parametrize(("length", "heads", "kv_heads"), [(5, 4, 2), (65, 2, 1), (150, 2, 2), (601, 2, 1)])
def test_strips_equal_the_softmax_written_out(length, heads, kv_heads):
    q, k, v = draw(length, heads, kv_heads)
    segments = np.ones((2, length), np.int32)
    segments[1, length // 2 :] = 2
    mask = packed_mask(jnp.asarray(segments))
    expected = written_out(q, k, v, np.asarray(mask))
    np.testing.assert_allclose(causal_attention(q, k, v, mask), expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(dot_product_attention(q, k, v, mask), expected, rtol=0, atol=2e-6)


def test_strips_have_the_gradients_of_the_whole():
    operands = draw(130, 4, 2)
    segments = jnp.asarray(np.repeat([[1, 2, 0]], [50, 70, 10], axis=1), jnp.int32)
    mask = packed_mask(jnp.concatenate([segments, segments]))
    used = (segments != 0)[..., None, None]

    def loss(attention):
        return jax.jit(jax.grad(lambda qkv: jnp.sum(jnp.where(used, jnp.sin(attention(*qkv, mask)), 0.0))))(operands)

    for strips, whole in zip(loss(causal_attention), loss(dot_product_attention), strict=True):
        np.testing.assert_allclose(strips, whole, rtol=0, atol=1e-5)


def test_the_softmax_is_float32_for_bfloat16_operands():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in draw(70, 2, 1))
    mask = packed_mask(jnp.ones((2, 70), jnp.int32))
    out = causal_attention(q, k, v, mask)
    wide = causal_attention(*(x.astype(jnp.float32) for x in (q, k, v)), mask)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), wide, rtol=0, atol=0.02)
    text = str(jax.make_jaxpr(causal_attention)(q, k, v, mask))
    assert "exp" in text
    assert not any("exp" in line and "bf16" in line for line in text.splitlines())


def test_masks():
    segments = jnp.asarray([[1, 1, 2, 0]], jnp.int32)
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(packed_mask(segments)[0].astype(int), expected)
    positions = jnp.asarray([[-1, 0, 2]], jnp.int32)
    np.testing.assert_array_equal(cache_mask(positions, 3)[0].astype(int), [[0, 0, 0], [1, 0, 0], [1, 1, 1]])
