"""The grouped products of the GPU forms, interpreted, and the ops that they make, against sums in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popax.kernels import triton
from popax.kernels.indexed_lora import decode_gpu

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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [1, 16])
def test_every_row_is_in_exactly_one_tile_and_no_tile_has_two_slots(kind, tile):
    rng = np.random.default_rng(5)
    for tokens, slots in ((1, 1), (7, 3), (40, 5), (64, 200)):
        slot = _slots(rng, kind, tokens, slots)
        tiles = triton.sorted_tiles(jnp.asarray(slot), slots, tile)
        seen = np.zeros(tokens, int)
        for owner, first, end in zip(*(np.asarray(each) for each in tiles[:3]), strict=True):
            rows = np.asarray(tiles.row_M)[first:end]
            assert len(rows) <= tile
            assert all((slot[row] if 0 <= slot[row] < slots else -1) == owner for row in rows)
            seen[rows] += 1
        np.testing.assert_array_equal(seen, 1)


SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 70), st.integers(1, 50), st.integers(1, 40))


@given(
    shape=SHAPES,
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    tile=st.sampled_from((1, 16)),
    with_y=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None)
def test_decode_against_the_sum(lora_math, shape, kind, dtype, tile, with_y, seed):
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
        blocks=triton.Blocks(tile=tile, block=32),
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


def test_an_empty_slot_has_a_gradient_of_zeros_whatever_its_scale():
    h, x = jnp.ones((2, 4)), jnp.ones((4, 3))
    first, end = jnp.array([0, 4], jnp.int32), jnp.array([4, 4], jnp.int32)
    scale, order = jnp.array([2.0, jnp.nan]), jnp.arange(4, dtype=jnp.int32)
    g = triton.outer(
        h, x, first, end, order, scale, triton.Blocks(tile=16, block=16), dtype=jnp.float32, name="g", interpret=True
    )
    np.testing.assert_array_equal(g[0], 8.0)
    np.testing.assert_array_equal(g[1], 0.0)
