"""XLA's forms: `jax.lax.ragged_dot`, and loops over blocks of rows that hold one group each for the host.

On CPU ragged_dot multiplies every row by every group's matrix. It does so on GPU, too, but there it is still ahead of a
loop, whose blocks wait for each other; sums of outer products, which adapters have of thousands of groups,
are one batch of blocks there.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers

# Rows of a block on the host: no more than a group has on average, so that small groups waste little.
LEAST_BLOCK, MOST_BLOCK = 8, 128
NARROW = 64
SAME = RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])
BACK = RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
OUTER = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


def matmul(rows_RxA: jax.Array, w_ExAxB: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """rows[r] w[group of r], [R, B]."""
    return jax.lax.platform_dependent(rows_RxA, w_ExAxB, sizes_E, cpu=blocked_matmul, default=ragged_matmul)


def back(rows_RxB: jax.Array, w_ExAxB: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """rows[r] w[group of r]^T, [R, A]."""
    return jax.lax.platform_dependent(rows_RxB, w_ExAxB, sizes_E, cpu=blocked_back, default=ragged_back)


def outer(
    left_RxA: jax.Array, right_RxB: jax.Array, sizes_E: jax.Array, *, dtype: jnp.dtype | None = None
) -> jax.Array:
    """The sum of left[r]^T right[r] over the rows of each group, [E, A, B]; zero for a group without rows."""
    # For a thousand groups the TPU's compiler takes minutes over ragged_dot; with a narrow side, an adapter's rank,
    # the blocks' products are small enough to be kept until they are added up.
    narrow = min(left_RxA.shape[1], right_RxB.shape[1]) <= NARROW
    forms = {"cpu": blocked_outer, "cuda": tiled_outer, "default": tiled_outer if narrow else ragged_outer}
    branches = {platform: functools.partial(form, dtype=dtype) for platform, form in forms.items()}
    return jax.lax.platform_dependent(left_RxA, right_RxB, sizes_E, **branches)


def ragged_matmul(rows_RxA: jax.Array, w_ExAxB: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _ragged(rows_RxA, w_ExAxB, sizes_E, SAME)


def ragged_back(rows_RxB: jax.Array, w_ExAxB: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _ragged(rows_RxB, w_ExAxB, sizes_E, BACK)


def _ragged(rows: jax.Array, w_ExAxB: jax.Array, sizes_E: jax.Array, dims: RaggedDotDimensionNumbers) -> jax.Array:
    # The TPU's instruction takes int8 beside wider rows; it refuses int4, and makes two copies of float8.
    w_ExAxB = w_ExAxB if w_ExAxB.dtype == jnp.int8 else w_ExAxB.astype(rows.dtype)
    return jax.lax.ragged_dot_general(rows, w_ExAxB, sizes_E, dims, preferred_element_type=rows.dtype)


def ragged_outer(
    left_RxA: jax.Array, right_RxB: jax.Array, sizes_E: jax.Array, *, dtype: jnp.dtype | None = None
) -> jax.Array:
    # The TPU's compiler fails where the sizes do not fill their tiles, of up to 1024: groups without rows fill them up.
    groups = sizes_E.shape[0]
    tile = min(1024, 1 << (groups - 1).bit_length())
    full_E = jnp.pad(sizes_E, (0, -groups % tile))
    out = jax.lax.ragged_dot_general(left_RxA, right_RxB, full_E, OUTER, preferred_element_type=dtype)
    return out[:groups]


def blocked_matmul(rows_RxA: jax.Array, w_ExAxB: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _over_blocks(rows_RxA, w_ExAxB, sizes_E, lambda rows, w: rows @ w, w_ExAxB.shape[2])


def blocked_back(rows_RxB: jax.Array, w_ExAxB: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _over_blocks(rows_RxB, w_ExAxB, sizes_E, lambda rows, w: rows @ w.T, w_ExAxB.shape[1])


def blocked_outer(
    left_RxA: jax.Array, right_RxB: jax.Array, sizes_E: jax.Array, *, dtype: jnp.dtype | None = None
) -> jax.Array:
    blocks = _Blocks.of(sizes_E, left_RxA.shape[0])
    left, right = _padded(left_RxA, blocks.size), _padded(right_RxB, blocks.size)

    def body(index: jax.Array, out_ExAxB: jax.Array) -> jax.Array:
        group, start, count = blocks.at(index)
        own_rx1 = (jnp.arange(blocks.size, dtype=jnp.int32) < count)[:, None]
        rows = jnp.where(own_rx1, _rows(left, start, blocks.size), jnp.zeros((), left.dtype))
        # Rows of other groups are zeroed on both sides: zero times what is not finite would not be zero.
        others = jnp.where(own_rx1, _rows(right, start, blocks.size), jnp.zeros((), right.dtype))
        return out_ExAxB.at[group].add(jnp.matmul(rows.T, others, preferred_element_type=dtype))

    shape = (sizes_E.shape[0], left_RxA.shape[1], right_RxB.shape[1])
    return jax.lax.fori_loop(0, blocks.total, body, jnp.zeros(shape, dtype or left_RxA.dtype))


def tiled_outer(
    left_RxA: jax.Array, right_RxB: jax.Array, sizes_E: jax.Array, *, dtype: jnp.dtype | None = None
) -> jax.Array:
    """The blocks' products in one batch, then added up by group: about twice the rows, and no loop."""
    blocks, rows = _Blocks.of(sizes_E, left_RxA.shape[0]), left_RxA.shape[0]
    index_P = jnp.arange(min(rows, -(-rows // blocks.size) + sizes_E.shape[0]), dtype=jnp.int32)
    group_P, start_P, count_P = jax.vmap(blocks.at)(index_P)
    place_r = jnp.arange(blocks.size, dtype=jnp.int32)
    own_Pxr = (place_r[None] < count_P[:, None]) & (index_P < blocks.total)[:, None]
    row_Pxr = jnp.where(own_Pxr, start_P[:, None] + place_r[None], 0)

    def own(side_RxA: jax.Array) -> jax.Array:
        return jnp.where(own_Pxr[..., None], side_RxA[row_Pxr], jnp.zeros((), side_RxA.dtype))

    part_PxAxB = jnp.einsum("pra,prb->pab", own(left_RxA), own(right_RxB), preferred_element_type=dtype)
    # A block beyond the last one is of group E, which there is not.
    return jax.ops.segment_sum(part_PxAxB, group_P, sizes_E.shape[0], indices_are_sorted=True)


class _Blocks(NamedTuple):
    """Rows cut in blocks of `size`, none of which begins in one group and counts rows of another."""

    size: int
    sizes_E: jax.Array
    starts_E: jax.Array  # first row of each group
    ends_E: jax.Array  # blocks up to and with each group's

    @classmethod
    def of(cls, sizes_E: jax.Array, rows: int) -> "_Blocks":
        average = max(1, rows // sizes_E.shape[0])
        size = min(max(1 << (average.bit_length() - 1), LEAST_BLOCK), MOST_BLOCK)
        sizes_E = sizes_E.astype(jnp.int32)
        ends_E = jnp.cumsum((sizes_E + (size - 1)) // size, dtype=jnp.int32)
        return cls(size, sizes_E, jnp.cumsum(sizes_E, dtype=jnp.int32) - sizes_E, ends_E)

    @property
    def total(self) -> jax.Array:
        """How many blocks hold a row: the loops stop there, so that an empty group costs nothing."""
        return self.ends_E[-1]

    def at(self, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(group, first row, how many of the block's rows are the group's)."""
        group = jnp.searchsorted(self.ends_E, index, side="right").astype(jnp.int32)
        before = self.ends_E[group] - (self.sizes_E[group] + (self.size - 1)) // self.size
        offset = (index - before) * self.size
        return group, self.starts_E[group] + offset, self.sizes_E[group] - offset


def _over_blocks(rows: jax.Array, w: jax.Array, sizes_E: jax.Array, product, width: int) -> jax.Array:
    blocks = _Blocks.of(sizes_E, rows.shape[0])
    padded = _padded(rows, blocks.size)

    def body(index: jax.Array, out: jax.Array) -> jax.Array:
        group, start, _ = blocks.at(index)
        own = jax.lax.dynamic_index_in_dim(w, group, keepdims=False).astype(rows.dtype)
        block = product(_rows(padded, start, blocks.size), own)
        # What a block writes past its group is overwritten: the next group's blocks come later.
        return jax.lax.dynamic_update_slice(out, block, (start, jnp.int32(0)))

    out = jnp.zeros((padded.shape[0], width), rows.dtype)
    return jax.lax.fori_loop(0, blocks.total, body, out)[: rows.shape[0]]


def _padded(rows: jax.Array, size: int) -> jax.Array:
    return jnp.pad(rows, ((0, size), (0, 0)))


def _rows(rows: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(rows, start, size)
