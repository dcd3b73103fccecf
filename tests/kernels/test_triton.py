"""The grouped products of the GPU forms, interpreted, and the ops that they make, against sums in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popax.kernels import triton
from popax.kernels.indexed_lora import decode_gpu, reference_decode

DTYPES = ("float32", "bfloat16")


def _slots(rng, kind, tokens, slots):
    """Slots by popularity; one in eight has no adapter, one in sixteen is out of range."""
    draw = {
        "distinct": lambda: rng.permutation(np.arange(tokens) % slots),
        "uniform": lambda: rng.integers(0, slots, tokens),
        "zipf": lambda: np.minimum(rng.zipf(1.5, tokens) - 1, slots - 1),
        "identical": lambda: np.full(tokens, rng.integers(0, slots)),
        "skewed": lambda: np.where(rng.random(tokens) < 0.9, 0, rng.integers(0, slots, tokens)),
    }[kind]()
    chance = rng.random(tokens)
    return np.where(chance < 1 / 8, -1, np.where(chance < 3 / 16, slots + 3, draw)).astype(np.int32)


KINDS = ("distinct", "uniform", "zipf", "identical", "skewed")


SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 70), st.integers(1, 50), st.integers(1, 40))


@pytest.mark.slow
@given(
    shape=SHAPES,
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    tile=st.sampled_from((1, 16)),
    launches=st.sampled_from((1, 2)),
    split=st.sampled_from((1, 3)),
    with_y=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None)
def test_decode_against_the_sum(lora_math, shape, kind, dtype, tile, launches, split, with_y, seed):
    """Rows beyond a slot's rank hold NaN, and so do slots that no token uses: neither is read."""
    tokens, slots, d_in, d_out, rank = shape
    rng = np.random.default_rng(seed)
    slot = _slots(rng, kind, tokens, slots)
    ranks = rng.integers(0, rank + 1, slots).astype(np.int32)
    dead = (np.arange(rank)[None, :] >= ranks[:, None])[..., None] | ~np.isin(np.arange(slots), slot)[:, None, None]
    x = lora_math.normal(seed, (tokens, d_in), dtype)
    a = jnp.where(dead, jnp.nan, lora_math.normal(seed + 1, (slots, rank, d_in))).astype(dtype)
    b = jnp.where(dead, jnp.nan, lora_math.normal(seed + 2, (slots, rank, d_out))).astype(dtype)
    y = lora_math.normal(seed + 3, (tokens, d_out), dtype) if with_y else None
    scale = jnp.asarray(rng.uniform(0.5, 2.0, slots), jnp.float32)
    (out,) = decode_gpu.decode(
        *(x, ((a, b, y),), (scale,), jnp.asarray(slot), jnp.asarray(ranks)),
        blocks=decode_gpu.Blocks(tile, 32, split, launches, 4, 2),
        interpret=True,
    )
    for row, owner in enumerate(slot):
        base = np.zeros(d_out) if y is None else np.asarray(y[row], np.float64)
        if not 0 <= owner < slots:
            np.testing.assert_array_equal(np.asarray(out[row], np.float64), base)
            continue
        live = int(ranks[owner])
        factors = (x[row : row + 1], a[owner, :live], b[owner, :live])
        want = lora_math.delta(*factors, float(scale[owner]))[0] + base
        sizes = [np.abs(np.asarray(each, np.float64)) for each in factors]
        magnitude = lora_math.delta(*sizes, float(scale[owner]))[0] + np.abs(base)
        lora_math.assert_close(out[row], want, magnitude, dtype, d_in + live)


def test_more_tokens_of_a_slot_than_a_tile_and_sites_that_share_x(lora_math):
    """40 tokens of one slot are three tiles; two sites of other widths, one without y; a NaN stays in its row."""
    slot, ranks = jnp.asarray([1] * 40 + [-1, 0], jnp.int32), jnp.full(3, 4, jnp.int32)
    x = lora_math.normal(1, (42, 24)).at[7].set(jnp.nan)
    sites = tuple(
        (lora_math.normal(2 + at, (3, 4, 24)), lora_math.normal(5 + at, (3, 4, width)), y)
        for at, (width, y) in enumerate(((20, lora_math.normal(9, (42, 20))), (50, None)))
    )
    scale = (jnp.ones(3), jnp.full(3, 0.5))
    want = reference_decode.decode(x, sites, scale, slot, ranks)
    for launches in (1, 2):
        blocks = decode_gpu.Blocks(16, 16, 2, launches, 4, 2)
        got = decode_gpu.decode(x, sites, scale, slot, ranks, blocks=blocks, interpret=True)
        for each, true in zip(got, want, strict=True):
            np.testing.assert_allclose(each, true, rtol=1e-4, atol=1e-4)
            assert np.flatnonzero(np.isnan(np.asarray(each)).any(axis=1)).tolist() == [7]


def test_many_tokens_are_grouped_rows(lora_math, monkeypatch):
    monkeypatch.setattr(decode_gpu, "MOST_TOKENS", 4)
    x, y = lora_math.normal(1, (6, 24)), lora_math.normal(2, (6, 10))
    site = (lora_math.normal(3, (3, 4, 24)), lora_math.normal(4, (3, 4, 10)), y)
    slot = jnp.asarray([0, 0, 2, -1, 2, 0], jnp.int32)
    (want,) = reference_decode.decode(x, (site,), (jnp.ones(3),), slot)
    (got,) = decode_gpu.decode(x, (site,), (jnp.ones(3),), slot, interpret=True)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_an_empty_slot_has_a_gradient_of_zeros_whatever_its_scale():
    h, x = jnp.ones((2, 4)), jnp.ones((4, 3))
    runs = triton.sorted_runs(jnp.zeros(4, jnp.int32), 2, 4)
    ranks, scale = jnp.full(2, 2, jnp.int32), jnp.array([2.0, jnp.nan])
    options = {"dtype": jnp.float32, "name": "g", "interpret": True}
    g = triton.outer(h, x, runs, ranks, scale, triton.Blocks(tile=16, block=16), **options)
    np.testing.assert_array_equal(g[0], 8.0)
    np.testing.assert_array_equal(g[1], 0.0)
