"""Grouped products: the host's blocks and XLA's ragged dots against a product for each row, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.modeling import grouped_matmul

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


@pytest.mark.parametrize("form", ["blocked_matmul", "ragged_matmul", "grouped_matmul"])
def test_every_row_meets_its_groups_matrix(operands, form):
    sizes, group, left, _, w = operands
    out = getattr(grouped_matmul, form)(jnp.asarray(left), jnp.asarray(w), jnp.asarray(sizes))
    assert out.dtype == jnp.float64
    want = np.einsum("ra,rab->rb", left[: len(group)], w[group])
    np.testing.assert_allclose(out[: len(group)], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["blocked_back", "ragged_back", "grouped_matmul_back"])
def test_every_row_meets_its_groups_matrix_transposed(operands, form):
    sizes, group, _, right, w = operands
    out = getattr(grouped_matmul, form)(jnp.asarray(right), jnp.asarray(w), jnp.asarray(sizes))
    want = np.einsum("rb,rab->ra", right[: len(group)], w[group])
    np.testing.assert_allclose(out[: len(group)], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["blocked_outer", "ragged_outer", "grouped_outer"])
def test_outer_products_are_summed_within_their_group(operands, form):
    sizes, group, left, right, _ = operands
    # What lies beyond the last group is not meant, and may be anything.
    left[len(group) :] = np.nan
    out = getattr(grouped_matmul, form)(jnp.asarray(left), jnp.asarray(right), jnp.asarray(sizes))
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
    text = jax.jit(grouped_matmul.grouped_matmul).lower(*arguments).compile().as_text()
    # 2048 rows in 64 groups are 32 a block: the one product in the program is that of a block.
    assert "f32[32,128]" in text
    assert f"f32[{groups},{rows},{width}]" not in text
