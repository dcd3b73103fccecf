"""Rows of many slots on GPU, interpreted, against sums in float64: ragged, empty and tiny groups, ranks, dead rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popax.kernels import triton
from popax.kernels.indexed_lora import grouped_gpu
from popax.kernels.indexed_lora.arg_specs import GroupedSpec
from popax.kernels.indexed_lora.ops import GROUPED, GROUPED_BACKWARD

DTYPES = ("float32", "bfloat16")
POPULARITY = ("distinct", "uniform", "zipf", "identical", "skewed")


def _slots(popularity, rows, slots, seed):
    """One in eight has no adapter, one in sixteen names a slot that is not there."""
    rng = np.random.default_rng(seed)
    draw = {
        "distinct": lambda: np.resize(rng.permutation(slots), rows),
        "uniform": lambda: rng.integers(0, slots, rows),
        "zipf": lambda: np.minimum(rng.zipf(1.5, rows) - 1, slots - 1),
        "identical": lambda: np.full(rows, rng.integers(0, slots)),
        "skewed": lambda: np.where(rng.random(rows) < 0.9, 0, rng.integers(0, slots, rows)),
    }[popularity]()
    chance = rng.random(rows)
    return np.where(chance < 1 / 8, -1, np.where(chance < 3 / 16, slots + 2, draw)).astype(np.int32)


def _sums(lora_math, operands, slot):
    """(out, dx, da, db, ds), each beside the sum of its products' sizes. operands: g, x, a, b, y, scale."""
    g, x, a, b, y, scale = operands
    shapes = (y.shape, x.shape, a.shape, b.shape, scale.shape)
    sums, sizes = ([np.zeros(shape) for shape in shapes] for _ in range(2))
    sums[0][:], sizes[0][:] = y, np.abs(y)
    for row, owner in enumerate(slot):
        if not 0 <= owner < a.shape[0]:
            continue
        one = (g[row : row + 1], x[row : row + 1], a[owner], b[owner])
        for total, parts in ((sums, one), (sizes, tuple(np.abs(each) for each in one))):
            total[0][row] += lora_math.delta(*parts[1:], scale[owner])[0]
            dx, da, db, ds = lora_math.vjp(*parts, scale[owner])
            total[1][row] += dx[0]
            total[2][owner] += da
            total[3][owner] += db
            total[4][owner] += ds
    return sums, sizes


@pytest.mark.slow
@given(
    shape=st.tuples(
        st.integers(1, 90), st.integers(1, 9), st.integers(1, 70), st.integers(1, 50), st.sampled_from((1, 3, 16, 20))
    ),
    dtype=st.sampled_from(DTYPES),
    popularity=st.sampled_from(POPULARITY),
    in_runs=st.booleans(),
    joint=st.sampled_from((0, 16, 64)),
    split=st.sampled_from((1, 3)),
    seed=st.integers(0, 99),
)
@settings(max_examples=5, deadline=None)
def test_forward_and_backward(lora_math, shape, dtype, popularity, in_runs, joint, split, seed):
    """Rows beyond a rank and slots that nobody names hold NaN, and an unused slot's scale is NaN: none is read."""
    rows, slots, d_in, d_out, rank = shape
    slot = _slots(popularity, rows, slots, seed)
    slot = np.sort(slot) if in_runs else slot
    ranks = np.random.default_rng(seed).integers(0, rank + 1, slots).astype(np.int32)
    unused = ~np.isin(np.arange(slots), slot)
    dead = (np.arange(rank)[None] >= ranks[:, None])[..., None] | unused[:, None, None]
    x, y, g = (lora_math.normal(seed + at, (rows, size), dtype) for at, size in enumerate((d_in, d_out, d_out)))
    factors = [lora_math.normal(seed + 3 + at, (slots, rank, size)) for at, size in enumerate((d_in, d_out))]
    a, b = (jnp.where(dead, jnp.nan, factor).astype(dtype) for factor in factors)
    scale = np.where(unused, np.nan, np.linspace(0.5, 2.0, slots)).astype(np.float32)
    options = {"blocks": triton.Blocks(tile=16, block=32, split=split, joint=joint), "interpret": True}
    out, h = grouped_gpu.forward(x, a, b, jnp.asarray(scale), jnp.asarray(slot), jnp.asarray(ranks), y, **options)
    got = grouped_gpu.backward(g, x, h, a, b, jnp.asarray(scale), jnp.asarray(slot), jnp.asarray(ranks), **options)

    alive = (np.where(dead, 0, factor) for factor in (a, b))
    wide = [np.asarray(each, np.float64) for each in (g, x, *alive, y, np.nan_to_num(scale))]
    sums, sizes = _sums(lora_math, wide, slot)
    terms = d_in + d_out + rank + rows
    for each, want, magnitude in zip((out, *got), sums, sizes, strict=True):
        # The result of h and of gb in dtype, rounded once more than in `assert_close`'s count.
        lora_math.assert_close(each, want, 2 * magnitude, dtype, terms)
    nobody = (slot < 0) | (slot >= slots)
    np.testing.assert_array_equal(np.asarray(out, np.float32)[nobody], np.asarray(y, np.float32)[nobody])
    assert h.shape == (rank, rows)
    assert not np.any(np.asarray(h, np.float32)[:, nobody])
    for each in got[1:3]:
        assert not np.any(np.asarray(each, np.float32)[np.broadcast_to(dead, each.shape)])
    assert not np.any(np.asarray(got[3])[unused])


@pytest.mark.parametrize("popularity", POPULARITY)
def test_each_row_is_in_one_tile_and_each_run_with_its_slot(popularity):
    for rows, slots, tile in ((7, 3, 1), (40, 5, 16)):
        slot = _slots(popularity, rows, slots, 5)
        most = 1 + int(np.sum(slot[1:] != slot[:-1]))
        tiles = triton.run_tiles(jnp.asarray(slot), slots, tile, most)
        owner_M = np.where((slot < 0) | (slot >= slots), -1, slot)
        seen = np.zeros(rows, int)
        for owner, first, end in zip(*(np.asarray(each) for each in tiles), strict=True):
            assert end - first <= tile
            assert all(owner_M[first:end] == owner)
            seen[first:end] += 1
        np.testing.assert_array_equal(seen, 1)
        runs = triton.sorted_runs(jnp.asarray(slot), slots, most)
        for each in range(slots):
            mine = range(int(runs.begin_S[each]), int(runs.stop_S[each]))
            found = [row for run in mine for row in range(int(runs.first_V[run]), int(runs.end_V[run]))]
            assert sorted(found) == list(np.flatnonzero(owner_M == each))


def test_a_users_nan_stays_with_them(lora_math):
    """Invariant 2, bitwise: tiles of one user's rows beside another's, in results and gradients."""
    slot = np.repeat(np.array([0, 1, 2, 1], np.int32), 20)
    x, y, g = (lora_math.normal(at, (80, 40)) for at in range(3))
    a, b = (lora_math.normal(at, (3, 8, 40)) for at in (4, 5))
    scale, ranks, slots = jnp.ones(3), jnp.full(3, 8, jnp.int32), jnp.asarray(slot)
    options = {"blocks": triton.Blocks(tile=16, block=32, joint=32), "interpret": True}

    def run(x, g):
        out, h = grouped_gpu.forward(x, a, b, scale, slots, ranks, y, **options)
        return out, *grouped_gpu.backward(g, x, h, a, b, scale, slots, ranks, **options)

    clean, poisoned = run(x, g), run(x.at[25].set(jnp.nan), g.at[70].set(jnp.nan))
    others = [slot != 1, slot != 1, np.arange(3) != 1, np.arange(3) != 1, np.arange(3) != 1]
    for before, after, keep in zip(clean, poisoned, others, strict=True):
        np.testing.assert_array_equal(np.asarray(before)[keep], np.asarray(after)[keep])
        assert np.isnan(np.asarray(after)[~keep]).any()


@pytest.mark.parametrize("op", [GROUPED, GROUPED_BACKWARD], ids=lambda op: op.name)
def test_factors_gathered_once_a_run_are_those_of_every_row(op):
    """The reference in 16 stretches, one of them nobody's, against a gather for each row."""
    spec = GroupedSpec("", 64, 5, 16, 24, 10, 4)
    operands = list(map(jnp.asarray, op.example(spec, jnp.float32, 3)))
    at = next(place for place, each in enumerate(operands) if each.shape == (64,) and each.dtype == jnp.int32)
    operands[at] = operands[at].at[4:8].set(-1)
    want, got = op.implementations["xla"](*operands, runs=None), op.implementations["xla"](*operands)
    for each, true in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(each, true, rtol=1e-4, atol=1e-4)
