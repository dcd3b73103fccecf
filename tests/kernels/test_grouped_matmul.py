"""Grouped products: the host's blocks, XLA's ragged dots and the GPU's kernel against a product for each row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.kernels import grouped_matmul as api
from popax.kernels.grouped_matmul import pallas_gpu, reference

# Empty groups at either end and between, a group of one row, rows beyond the last group, a single group.
SIZES = [(0, 33, 1, 0, 50, 0), (100, 0, 0), (0, 0, 0), (7,), (3, 130, 2)]


@pytest.fixture(params=SIZES, ids=str)
def operands(request):
    sizes = np.asarray(request.param)
    rng, rows = np.random.default_rng(0), sizes.sum() + 9
    group = np.repeat(np.arange(len(sizes)), sizes)
    arrays = rng.normal(size=(rows, 6)), rng.normal(size=(rows, 7)), rng.normal(size=(len(sizes), 6, 7))
    with jax.enable_x64(True):
        yield sizes.astype(np.int32), group, *arrays


@pytest.mark.parametrize("form", [reference.blocked_matmul, reference.ragged_matmul, api.grouped_matmul])
def test_every_row_meets_its_groups_matrix(operands, form):
    sizes, group, left, _, w = operands
    out = form(jnp.asarray(left), jnp.asarray(w), jnp.asarray(sizes))
    assert out.dtype == jnp.float64
    want = np.einsum("ra,rab->rb", left[: len(group)], w[group])
    np.testing.assert_allclose(out[: len(group)], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", [reference.blocked_back, reference.ragged_back, api.grouped_matmul_back])
def test_every_row_meets_its_groups_matrix_transposed(operands, form):
    sizes, group, _, right, w = operands
    out = form(jnp.asarray(right), jnp.asarray(w), jnp.asarray(sizes))
    want = np.einsum("rb,rab->ra", right[: len(group)], w[group])
    np.testing.assert_allclose(out[: len(group)], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["matmul", "back"])
def test_narrow_matrices_are_converted_where_they_are_used(form):
    rng, sizes = np.random.default_rng(0), np.asarray((3, 0, 14), np.int32)
    w = rng.integers(-127, 128, (3, 6, 7), np.int8)
    rows = rng.normal(size=(20, 6 if form == "matmul" else 7)).astype(np.float32)
    line = "ra,rab->rb" if form == "matmul" else "rb,rab->ra"
    want = np.einsum(line, rows[:17].astype(np.float64), np.repeat(w, sizes, axis=0).astype(np.float64))
    on_gpu = functools.partial(getattr(pallas_gpu, form), interpret=True)
    for run in (getattr(reference, f"blocked_{form}"), getattr(reference, f"ragged_{form}"), on_gpu):
        out = run(jnp.asarray(rows), jnp.asarray(w), jnp.asarray(sizes))
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out[:17], want, rtol=1e-5, atol=1e-4)
    with pytest.raises(NotImplementedError, match="int16"):
        on_gpu(jnp.asarray(rows), jnp.asarray(w, jnp.int16), jnp.asarray(sizes))


@pytest.mark.parametrize(
    "form", [reference.blocked_outer, reference.tiled_outer, reference.ragged_outer, api.grouped_outer]
)
def test_outer_products_are_summed_within_their_group(operands, form):
    sizes, group, left, right, _ = operands
    # What lies beyond the last group is not meant, and may be anything.
    left[len(group) :] = np.nan
    out = form(jnp.asarray(left), jnp.asarray(right), jnp.asarray(sizes))
    for index in range(len(sizes)):
        rows = np.flatnonzero(group == index)
        np.testing.assert_allclose(out[index], left[rows].T @ right[rows], rtol=1e-12, atol=1e-12)


def test_the_host_multiplies_rows_and_not_rows_times_groups():
    """With 64 groups ragged_dot costs the host 64 times the products of its rows; the blocks at most pad each group."""
    rows, width, groups = 2048, 128, 64
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, width), (groups, width, width), (groups,))
    ]
    arguments[2] = jax.ShapeDtypeStruct((groups,), jnp.int32)
    text = jax.jit(api.grouped_matmul).lower(*arguments).compile().as_text()
    # 2048 rows in 64 groups are 32 a block: the one product in the program is that of a block.
    assert "f32[32,128]" in text
    assert f"f32[{groups},{rows},{width}]" not in text


@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
@pytest.mark.parametrize("sizes", [*SIZES, (16, 16, 64, 0, 40)], ids=str)
def test_the_gpus_kernel_is_the_hosts_form(sizes, back):
    rng, sizes = np.random.default_rng(1), np.asarray(sizes, np.int32)
    rows = rng.normal(size=(sizes.sum() + 9, 40 if back else 70)).astype(np.float32)
    w = rng.normal(size=(len(sizes), 70, 40)).astype(np.float32)
    # Nobody's rows hold anything.
    rows[sizes.sum() :] = np.nan
    blocks = pallas_gpu.Blocks(tile=16, block=16, depth=16)
    form = pallas_gpu.back if back else pallas_gpu.matmul
    out = form(jnp.asarray(rows), jnp.asarray(w), jnp.asarray(sizes), blocks=blocks, interpret=True)
    own = np.repeat(w, sizes, axis=0).astype(np.float64)
    want = np.einsum("rb,rab->ra" if back else "ra,rab->rb", rows[: sizes.sum()].astype(np.float64), own)
    np.testing.assert_allclose(out[: sizes.sum()], want, rtol=1e-5, atol=1e-4)
