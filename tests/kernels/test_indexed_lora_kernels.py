"""The indexed op on TPU, interpreted, against sums in float64; decode with race detection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from popax.kernels import target
from popax.kernels.indexed_lora import (
    decode_tpu,
    grouped_tpu,
    groups,
    indexed_lora,
    indexed_lora_sites,
    reference_decode,
    reference_grouped,
    vjp,
)

DTYPES = ("float32", "bfloat16")
POPULARITY = ("distinct", "uniform", "zipf", "identical", "skewed")


def _slots(popularity, tokens, slots, seed):
    """One in eight has no adapter, one in sixteen names a slot that is not there."""
    rng = np.random.default_rng(seed)
    draw = {
        "distinct": lambda: np.resize(rng.permutation(slots), tokens),
        "uniform": lambda: rng.integers(0, slots, tokens),
        "zipf": lambda: np.minimum(rng.zipf(1.5, tokens) - 1, slots - 1),
        "identical": lambda: np.full(tokens, rng.integers(0, slots)),
        "skewed": lambda: np.where(rng.random(tokens) < 0.9, 0, rng.integers(0, slots, tokens)),
    }[popularity]()
    chance = rng.random(tokens)
    return jnp.asarray(np.where(chance < 1 / 8, -1, np.where(chance < 3 / 16, slots + 2, draw)), jnp.int32)


def _dead(slot, ranks, rank, slots):
    """What no token may read: rows beyond a slot's rank, and slots that nobody names."""
    unused = ~np.isin(np.arange(slots), np.asarray(slot))
    return (np.arange(rank)[None] >= np.asarray(ranks)[:, None])[..., None] | unused[:, None, None]


def _check_rows(lora_math, out, x, a, b, y, scale, slot, ranks, dtype):
    slots = a.shape[0]
    for row, owner in enumerate(np.asarray(slot)):
        if not 0 <= owner < slots:
            np.testing.assert_array_equal(np.asarray(out[row], np.float64), np.asarray(y[row], np.float64))
            continue
        live, size, base = int(ranks[owner]), float(scale[owner]), np.asarray(y[row], np.float64)
        one = (x[row : row + 1], a[owner, :live], b[owner, :live])
        sizes = [np.abs(np.asarray(each, np.float64)) for each in one]
        want, magnitude = lora_math.delta(*one, size)[0] + base, lora_math.delta(*sizes, size)[0] + np.abs(base)
        lora_math.assert_close(out[row], want, magnitude, dtype, x.shape[1] + live)


@pytest.mark.slow
@given(
    tokens=st.integers(1, 12),
    slots=st.integers(1, 9),
    rank=st.sampled_from((2, 3, 8, 16, 32, 128)),
    widths=st.sampled_from(((128,), (384, 128), (96, 128, 256))),
    dtype=st.sampled_from(DTYPES),
    popularity=st.sampled_from(POPULARITY),
    seed=st.integers(0, 99),
)
@settings(max_examples=6, deadline=None)
def test_decode_against_the_sums_without_a_race(lora_math, tokens, slots, rank, widths, dtype, popularity, seed):
    """Dead rows hold NaN; copies overlap with products, and the interpreter watches every access."""
    slot = _slots(popularity, tokens, slots, seed)
    ranks = jnp.asarray(np.random.default_rng(seed).integers(0, rank + 1, slots), jnp.int32)
    dead, d_in = _dead(slot, ranks, rank, slots), 256
    x, sites, scale = lora_math.normal(seed, (tokens, d_in), dtype), [], []
    for index, width in enumerate(widths):
        a, b = (lora_math.normal(seed + 2 * index + at, (slots, rank, size)) for at, size in ((1, d_in), (2, width)))
        factors = [jnp.where(dead, jnp.nan, factor).astype(dtype) for factor in (a, b)]
        sites.append((*factors, lora_math.normal(seed + 50 + index, (tokens, width), dtype)))
        scale.append(jnp.linspace(0.5, 1.0 + index, slots, dtype=jnp.float32))
    blocks = decode_tpu.default_blocks(tokens, d_in, rank, len(sites), x.dtype.itemsize)
    outs = decode_tpu.decode(
        *(x, tuple(sites), tuple(scale), slot, ranks),
        blocks=blocks._replace(columns=128, depth=2),
        interpret=pltpu.InterpretParams(detect_races=True),
    )
    assert not interpret_pallas_call.races.races_found
    for out, (a, b, y), scale_S in zip(outs, sites, scale, strict=True):
        _check_rows(lora_math, out, x, a, b, y, scale_S, slot, ranks, dtype)


def test_the_reference_of_decode_is_the_sums(lora_math):
    slot, ranks = _slots("uniform", 20, 6, 3), jnp.asarray([4, 3, 0, 1, 4, 2], jnp.int32)
    x, y = lora_math.normal(1, (20, 24)), lora_math.normal(2, (20, 10))
    a, b = lora_math.normal(3, (6, 4, 24)), lora_math.normal(4, (6, 4, 10))
    scale = jnp.linspace(0.5, 2.0, 6, dtype=jnp.float32)
    (out,) = reference_decode.decode(x, ((a, b, y),), (scale,), slot, ranks)
    _check_rows(lora_math, out, x, a, b, y, scale, slot, ranks, "float32")


@pytest.mark.parametrize(
    ("shape", "message"),
    [((8, 100, 16), "D = 100"), ((8, 128, 1), "rank 1"), ((2000, 128, 16), "2000 tokens")],
)
def test_decode_says_what_it_does_not_take(shape, message):
    tokens, d_in, rank = shape
    abstract = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)  # noqa: E731
    site = (abstract(4, rank, d_in), abstract(4, rank, 128), abstract(tokens, 128))
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(
            lambda x, site, scale, slot: decode_tpu.decode(x, (site,), (scale,), slot),
            *(abstract(tokens, d_in), site, abstract(4, dtype=jnp.float32), abstract(tokens, dtype=jnp.int32)),
        )


@pytest.mark.slow
@given(
    rows=st.integers(1, 300),
    slots=st.integers(1, 9),
    rank=st.sampled_from((2, 8, 16, 48)),
    dtype=st.sampled_from(DTYPES),
    popularity=st.sampled_from(POPULARITY),
    in_runs=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=6, deadline=None)
def test_grouped_forward_and_backward(lora_math, rows, slots, rank, dtype, popularity, in_runs, seed):
    """Ragged and empty groups, groups smaller than a tile, slots in any order; dead rows of the factors hold NaN."""
    slot = _slots(popularity, rows, slots, seed)
    slot = jnp.sort(slot) if in_runs else slot
    ranks = jnp.asarray(np.random.default_rng(seed).integers(0, rank + 1, slots), jnp.int32)
    dead, d_in, d_out = _dead(slot, ranks, rank, slots), 256, 96
    x, y = lora_math.normal(seed, (rows, d_in), dtype), lora_math.normal(seed + 1, (rows, d_out), dtype)
    factors = [lora_math.normal(seed + 2 + at, (slots, rank, size)) for at, size in enumerate((d_in, d_out))]
    a, b = (jnp.where(dead, jnp.nan, factor).astype(dtype) for factor in factors)
    scale = jnp.linspace(0.5, 2.0, slots, dtype=jnp.float32)
    blocks = grouped_tpu.Blocks(min(rows, 128), 128, 16 if rank % 16 == 0 else rank)
    options = {"blocks": blocks, "interpret": True}
    out, h = grouped_tpu.forward(x, a, b, scale, slot, ranks, y, **options)
    _check_rows(lora_math, out, x, a, b, y, scale, slot, ranks, dtype)

    g = lora_math.normal(seed + 9, (rows, d_out), dtype)
    got = grouped_tpu.backward(g, x, h, a, b, scale, slot, ranks, **options)
    wide = [np.where(dead, 0.0, np.asarray(factor, np.float64)) for factor in (a, b)]
    sums = [np.zeros((rows, d_in)), *(np.zeros(factor.shape) for factor in wide), np.zeros(slots)]
    sizes = [np.zeros_like(each) for each in sums]
    for row, owner in enumerate(np.asarray(slot)):
        if 0 <= owner < slots:
            one = [np.asarray(each[row : row + 1], np.float64) for each in (g, x)]
            one += [wide[0][owner], wide[1][owner]]
            for total, parts in (
                (sums, lora_math.vjp(*one, float(scale[owner]))),
                (sizes, lora_math.vjp(*(np.abs(each) for each in one), float(scale[owner]))),
            ):
                total[0][row] += parts[0][0]
                for at in (1, 2, 3):
                    total[at][owner] += parts[at]
    for each, want, magnitude in zip(got, sums, sizes, strict=True):
        lora_math.assert_close(each, want, magnitude, dtype, d_in + d_out + rank + rows)
    assert not np.any(np.asarray(got[1], np.float32)[np.broadcast_to(dead, a.shape)])


def test_the_reference_of_grouped_is_the_sums_and_its_own_derivative(lora_math):
    slot, ranks = _slots("zipf", 30, 5, 4), jnp.asarray([4, 3, 0, 1, 4], jnp.int32)
    x, y, g = (lora_math.normal(at, (30, size)) for at, size in ((1, 24), (2, 10), (3, 10)))
    a, b = lora_math.normal(4, (5, 4, 24)), lora_math.normal(5, (5, 4, 10))
    scale = jnp.linspace(0.5, 2.0, 5, dtype=jnp.float32)
    out, h = reference_grouped.forward(x, a, b, scale, slot, ranks, y)
    _check_rows(lora_math, out, x, a, b, y, scale, slot, ranks, "float32")
    got = reference_grouped.backward(g, x, h, a, b, scale, slot, ranks)
    forward = lambda x, a, b, scale: reference_grouped.forward(x, a, b, scale, slot, ranks, y)[0]  # noqa: E731
    want = jax.vjp(forward, x, a, b, scale)[1](g)
    for each, true in zip(got, want, strict=True):
        np.testing.assert_allclose(each, true, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize(("rows", "tile"), [(1, 1), (70, 16), (64, 64), (130, 128)])
def test_each_row_and_chunk_is_in_exactly_one_unit(popularity, rows, tile):
    slots, rank_block, chunks = 6, 4, 3
    slot, ranks = _slots(popularity, rows, slots, 8), np.array([0, 1, 4, 5, 12, 9], np.int32)
    units = groups.by_tile(slot, jnp.asarray(ranks), tile=tile, rank_block=rank_block, chunks=chunks, most_runs=rows)
    owned = groups.by_slot(units, chunks)
    for walk in (units, owned):
        seen = np.zeros((rows, chunks), int)
        fields = [np.asarray(field)[: int(walk.count[0])] for field in walk[1:]]
        for at_tile, owner, chunk, first, end, rank in zip(*fields, strict=True):
            assert first >= at_tile * tile
            assert end <= (at_tile + 1) * tile
            if end > first:
                assert rank == ranks[owner]
                assert all(np.asarray(slot)[first:end] == owner)
            seen[first:end, chunk] += 1
        valid = (np.asarray(slot) >= 0) & (np.asarray(slot) < slots)
        rank_of = np.where(valid, ranks[np.clip(np.asarray(slot), 0, slots - 1)], 0)
        np.testing.assert_array_equal(seen, np.arange(chunks)[None] * rank_block < rank_of[:, None])
    assert set(np.asarray(units.tile_U)[: int(units.count[0])]) == set(range(-(-rows // tile)))
    keys = np.asarray(owned.slot_U * chunks + owned.chunk_U)[: int(owned.count[0])]
    np.testing.assert_array_equal(keys, np.sort(keys))


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("with_y", [False, True])
def test_the_accelerators_road_is_the_cpus(lora_math, monkeypatch, tokens, with_y):
    """Values and gradients; the kernels' own are above, here they leave the shape to XLA."""
    x, y = lora_math.normal(1, (6, tokens, 24)), lora_math.normal(2, (6, tokens, 10))
    a, b = lora_math.normal(3, (4, 3, 24)), lora_math.normal(4, (4, 3, 10))
    slot, g = jnp.asarray([0, -1, 3, 3, 9, 1], jnp.int32), lora_math.normal(5, (6, tokens, 10))

    def value_and_gradients():
        call = lambda x, a, b, s, y: indexed_lora(x, a, b, s, slot, y if with_y else None)  # noqa: E731
        out, pullback = jax.vjp(call, x, a, b, jnp.float32(0.5), y)
        return out, *pullback(g)

    want = value_and_gradients()
    monkeypatch.setattr(target, "platform", lambda: "tpu")
    got = value_and_gradients()
    for each, true in zip(got, want, strict=True):
        np.testing.assert_allclose(each, true, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[0][1], y[1] if with_y else 0.0)


@pytest.mark.slow
def test_sites_that_share_x_are_one_launch(lora_math, monkeypatch):
    """q, k and v of one rank decode together, one of another rank apart; values and gradients are each site's own."""
    x, slot = lora_math.normal(1, (6, 1, 24)), jnp.asarray([0, -1, 3, 3, 9, 1], jnp.int32)
    ranks_and_widths = ((3, 10), (2, 6), (3, 8))
    sites = tuple(
        tuple(
            lora_math.normal(10 * at + index, shape)
            for index, shape in enumerate(((4, rank, 24), (4, rank, width), (6, 1, width)))
        )
        for at, (rank, width) in enumerate(ranks_and_widths)
    )
    scales = tuple(jnp.float32(value) for value in (0.5, 2.0, 1.5))

    def loss(x, sites):
        outputs = indexed_lora_sites(x, sites, scales, slot)
        return sum(jnp.sum(jnp.sin(output)) for output in outputs), outputs

    want = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, sites)
    monkeypatch.setattr(target, "platform", lambda: "tpu")
    launches, decode = [], vjp.decode
    got = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, sites)
    monkeypatch.setattr(vjp, "decode", lambda x, sites, *rest: launches.append(len(sites)) or decode(x, sites, *rest))
    jax.eval_shape(loss, x, sites)
    assert launches == [2, 1]
    for each, true in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(each, true, rtol=1e-5, atol=1e-5)
