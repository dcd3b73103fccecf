"""Attention in blocks against the softmax written out, values and gradients; its memory is linear in the row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popax.kernels.attention import packed_attention, sees
from popax.kernels.attention.reference import packed_attention as written_out

SCALE = 0.3


def draw(batch, kv_heads, groups, length, dim, value_dim, segments, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (
        (batch, kv_heads, groups, length, dim),
        (batch, kv_heads, length, dim),
        (batch, kv_heads, length, value_dim),
    )
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes], jnp.asarray(segments, jnp.int32)


def gradients(attention, operands):
    return jax.jit(jax.grad(lambda given: jnp.sum(jnp.sin(attention(*given).astype(jnp.float32)))))(operands)


@st.composite
def packed_rows(draw_from):
    """Segment ids of two rows: virtual tokens in front of some, texts, and padding at the end of some."""
    length = draw_from(st.integers(1, 70))
    rows = []
    for _ in range(2):
        cuts = sorted(draw_from(st.lists(st.integers(0, length), max_size=4)))
        row = np.searchsorted(cuts, np.arange(length), side="right") + 1
        front, end = draw_from(st.integers(0, 5)), draw_from(st.integers(0, 9))
        row[:front] = -1
        row[length - min(end, length) :] = 0
        rows.append(row)
    return np.stack(rows)


@settings(max_examples=12, deadline=None)
@given(packed_rows(), st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]), st.sampled_from([(8, 8), (12, 5)]))
def test_blocks_are_the_softmax_written_out(segments, heads, dims):
    """Grouped heads, values of another width (latent attention), rows that no block divides."""
    operands, segments = draw(2, *heads, segments.shape[1], *dims, segments)
    blocks = lambda q, k, v: packed_attention(q, k, v, segments, scale=SCALE, block=16)  # noqa: E731
    whole = lambda q, k, v: written_out(q, k, v, segments, SCALE)  # noqa: E731
    np.testing.assert_allclose(blocks(*operands), whole(*operands), rtol=0, atol=1e-5)
    for mine, theirs in zip(gradients(blocks, operands), gradients(whole, operands), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)


def test_a_population_of_rows_is_each_row_alone():
    """Under vmap, with the segments of each user's own."""
    segments = np.stack([np.repeat([1, 2], [20, 13]), np.repeat([1, 0], [30, 3]), np.repeat([-1, 1], [4, 29])])
    operands, segments = draw(3, 2, 2, 33, 8, 8, segments)
    alone = lambda q, k, v, own: packed_attention(q[None], k[None], v[None], own[None], scale=SCALE, block=8)[0]  # noqa: E731
    together = jax.vmap(alone)(*operands, segments)
    np.testing.assert_array_equal(together, packed_attention(*operands, segments, scale=SCALE, block=8))
    grads = gradients(lambda *given: jax.vmap(alone)(*given, segments), operands)
    for user in range(3):
        own = gradients(lambda *given, user=user: alone(*given, segments[user]), [each[user] for each in operands])
        for mine, theirs in zip(own, grads, strict=True):
            np.testing.assert_allclose(mine, theirs[user], rtol=0, atol=1e-6)


def test_the_softmax_is_float32_for_bfloat16_operands():
    operands, segments = draw(1, 2, 1, 40, 8, 8, np.ones((1, 40)), dtype=jnp.bfloat16)
    out = packed_attention(*operands, segments, scale=SCALE, block=16)
    assert out.dtype == jnp.bfloat16
    wide = packed_attention(*(each.astype(jnp.float32) for each in operands), segments, scale=SCALE, block=16)
    np.testing.assert_allclose(out.astype(jnp.float32), wide, rtol=0, atol=0.02)
    assert {each.dtype for each in gradients(lambda *g: packed_attention(*g, segments, scale=SCALE), operands)} == {
        jnp.dtype(jnp.bfloat16)
    }


def test_large_scores_do_not_overflow():
    operands, segments = draw(1, 1, 1, 20, 4, 4, np.ones((1, 20)))
    loud = [1e4 * each for each in operands[:2]] + operands[2:]
    out = packed_attention(*loud, segments, scale=1.0, block=8)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, written_out(*loud, segments, 1.0), rtol=1e-5)


def test_what_a_token_sees():
    segments = jnp.asarray([[-1, -1, 1, 1, 2, 0]], jnp.int32)
    at = jnp.arange(6)
    seen = np.asarray(sees(segments, segments, at, at))[0].astype(int)
    np.testing.assert_array_equal(
        seen,
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 0],
            [0, 0, 0, 0, 0, 0],
        ],
    )


def temporaries(length: int) -> int:
    """Bytes that forward and backward take beside operands and results, as compiled and not run."""
    shapes = [(1, 2, 2, length, 16), (1, 2, length, 16), (1, 2, length, 16)]
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def gradient(operands, segments):
        loss = lambda given: jnp.sum(packed_attention(*given, segments, scale=SCALE))  # noqa: E731
        return jax.grad(loss)(operands)

    return jax.jit(gradient).lower(operands, segments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("length", [1024, 4096, 16384])
def test_memory_at_most_doubles_with_the_row(length):
    assert temporaries(2 * length) <= 2.2 * temporaries(length)
