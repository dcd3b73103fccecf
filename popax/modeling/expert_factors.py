"""Rows sorted by expert times the adapters' factors of each row's (slot, expert): the side where experts differ.

A group is the rows of one slot at one expert. Where there are more rows than groups, rows are sorted by group and go
through grouped products, so that no factor is copied for a row. Where there are fewer, as in decode, the factors of the
rows are gathered: the others are then not read at all. Either way what is copied is at most as large as the factors.

R is rows here, and Q the rank of the factors; S slots, E experts, F the experts' own width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from popax.kernels.grouped_matmul import grouped_matmul, grouped_matmul_back, grouped_outer
from popax.modeling.sorted_rows import Sorted, most_rows, sort_copies
from popax.types import ExpertFactors


class Window(NamedTuple):
    """The `count` slots from `start` on, among which all of a chunk's tokens have theirs.

    A gradient is added to the slots of the window alone: a chunk of a few users' tokens leaves the others' untouched.
    """

    start: jax.Array
    count: int

    @classmethod
    def of(cls, slot_Mx1: jax.Array, slots: int, stretch: int | None) -> "Window":
        """stretch: how many consecutive tokens have one slot, and the next ones the next; None for any order."""
        if stretch is None:
            return cls(jnp.zeros((), jnp.int32), slots)
        count = min(slots, -(-(slot_Mx1.shape[0] - 1) // stretch) + 1)
        return cls(jnp.clip(slot_Mx1[0, 0], 0, slots - count).astype(jnp.int32), count)

    def cut(self, factors: ExpertFactors) -> ExpertFactors:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, self.start, self.count), factors)

    def add(self, sums: ExpertFactors, own: ExpertFactors) -> ExpertFactors:
        """sums [S, ...] with own [count, ...] added where it belongs."""

        def at(total: jax.Array, part: jax.Array) -> jax.Array:
            new = jax.lax.dynamic_slice_in_dim(total, self.start, self.count) + part.astype(total.dtype)
            return jax.lax.dynamic_update_slice_in_dim(total, new, self.start, axis=0)

        return jax.tree.map(at, sums, own)


class Owners(NamedTuple):
    """Whose factor each row meets. own_R: False for rows of the base alone, and of no expert.

    sizes_G: rows of each group, expert by expert and in it slot by slot; rows of the base alone count to some slot.
    None where factors are gathered.
    """

    slot_R: jax.Array
    expert_R: jax.Array
    own_R: jax.Array
    sizes_G: jax.Array | None

    def masked(self, rows: jax.Array) -> jax.Array:
        """Zero where a row is nobody's: what is not finite there must not meet a factor, nor a gradient."""
        return jnp.where(self.own_R[:, None], rows, jnp.zeros((), rows.dtype))


class SlotRows(NamedTuple):
    """Sorted copies of one chunk of tokens, and the adapters' factors for them; all but the rows None without.

    gate, up and down are those of the window: [count, E, Q, F].
    """

    rows: Sorted
    owners: Owners | None = None
    window: Window | None = None
    gate: jax.Array | None = None
    up: jax.Array | None = None
    down: jax.Array | None = None

    @classmethod
    def of(
        cls,
        expert_MxK: jax.Array,
        slot_Mx1: jax.Array | None,
        num_experts: int,
        factors: ExpertFactors | None,
        stretch: int | None,
    ) -> "SlotRows":
        """stretch: as in `Window.of`."""
        if factors is None or slot_Mx1 is None:
            return cls(sort_copies(expert_MxK, num_experts))
        window = Window.of(slot_Mx1, jax.tree.leaves(factors)[0].shape[0], stretch)
        local_Mx1 = slot_Mx1 - window.start
        here_Mx1 = jnp.clip(local_Mx1, 0, window.count - 1)
        by_group = most_rows(expert_MxK, num_experts) > num_experts * window.count
        parts = (here_Mx1, window.count) if by_group else (None, 1)
        rows = sort_copies(expert_MxK, num_experts, *parts)
        expert_R = rows.of_copies(expert_MxK)
        own_R = rows.of_tokens(local_Mx1 == here_Mx1)[:, 0] & (expert_R < num_experts)
        expert_R, slot_R = jnp.minimum(expert_R, num_experts - 1), rows.of_tokens(here_Mx1)[:, 0]
        owners, own = Owners(slot_R, expert_R, own_R, rows.sizes_G if by_group else None), window.cut(factors)
        return cls(rows, owners, window, own.gate, own.up, own.down)

    def added(self, y_RxF: jax.Array, low_MxQ: jax.Array | None, factor: jax.Array | None) -> jax.Array:
        """y + low factor; y's very bytes where a row is the base's alone."""
        if factor is None or low_MxQ is None or self.owners is None:
            return y_RxF
        delta_RxF = expand(self.rows.of_tokens(low_MxQ), factor, self.owners)
        return jnp.where(self.owners.own_R[:, None], y_RxF + delta_RxF, y_RxF)

    def to_low(self, rows_RxF: jax.Array, factor: jax.Array | None) -> jax.Array | None:
        """The sum over each token's rows of row factor^T, [M, Q]."""
        if factor is None or self.owners is None:
            return None
        return self.rows.to_tokens(contract(rows_RxF, factor, self.owners))

    def add_gradients(self, sums: ExpertFactors, *pairs: tuple[jax.Array | None, jax.Array]) -> ExpertFactors:
        """sums [S, ...] with the gradients of gate, up and down, each from (low [M, Q], rows [R, F])."""
        found = []
        for factor, (low_MxQ, rows_RxF) in zip((self.gate, self.up, self.down), pairs, strict=True):
            if factor is None or low_MxQ is None or self.owners is None:
                found.append(None)
            else:
                found.append(outer(self.rows.of_tokens(low_MxQ), rows_RxF, factor, self.owners))
        own = ExpertFactors(gate=found[0], up=found[1], down=found[2], in_order=sums.in_order)
        return sums if self.window is None else self.window.add(sums, own)


def expand(low_RxQ: jax.Array, factor_SxExQxF: jax.Array, owners: Owners) -> jax.Array:
    """low[r] factor[slot, expert of r], [R, F] in low's dtype."""
    low_RxQ = owners.masked(low_RxQ)
    if owners.sizes_G is None:
        return _gathered("rq,rqf->rf", low_RxQ, factor_SxExQxF, owners)
    return grouped_matmul(low_RxQ, _by_group(factor_SxExQxF, low_RxQ.dtype), owners.sizes_G)


def contract(rows_RxF: jax.Array, factor_SxExQxF: jax.Array, owners: Owners) -> jax.Array:
    """rows[r] factor[slot, expert of r]^T, [R, Q] in the rows' dtype; zero where a row is nobody's."""
    rows_RxF = owners.masked(rows_RxF)
    if owners.sizes_G is None:
        return _gathered("rf,rqf->rq", rows_RxF, factor_SxExQxF, owners)
    low_RxQ = grouped_matmul_back(rows_RxF, _by_group(factor_SxExQxF, rows_RxF.dtype), owners.sizes_G)
    return owners.masked(low_RxQ)


def outer(low_RxQ: jax.Array, rows_RxF: jax.Array, factor_SxExQxF: jax.Array, owners: Owners) -> jax.Array:
    """The factor's gradient, shaped like it, float32 or wider: low[r]^T rows[r] summed over each (slot, expert)."""
    low_RxQ, rows_RxF, wide = owners.masked(low_RxQ), owners.masked(rows_RxF), _wide(low_RxQ.dtype)
    slots, experts, rank, width = factor_SxExQxF.shape
    if owners.sizes_G is None:
        own_RxQxF = low_RxQ.astype(wide)[:, :, None] * rows_RxF.astype(wide)[:, None, :]
        return jnp.zeros(factor_SxExQxF.shape, wide).at[owners.slot_R, owners.expert_R].add(own_RxQxF)
    by_group_GxQxF = grouped_outer(low_RxQ, rows_RxF, owners.sizes_G, dtype=wide)
    return jnp.swapaxes(by_group_GxQxF.reshape(experts, slots, rank, width), 0, 1)


def _by_group(factor_SxExQxF: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[E S, Q, F]: groups are in the order of experts, so that their rows are those of the experts' own products."""
    return jnp.swapaxes(factor_SxExQxF, 0, 1).reshape(-1, *factor_SxExQxF.shape[2:]).astype(dtype)


def _gathered(subscripts: str, rows: jax.Array, factor_SxExQxF: jax.Array, owners: Owners) -> jax.Array:
    picked_RxQxF = factor_SxExQxF[owners.slot_R, owners.expert_R].astype(rows.dtype)
    return jnp.einsum(subscripts, rows, picked_RxQxF, preferred_element_type=_wide(rows.dtype)).astype(rows.dtype)


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)
