"""What the experts of one device make of tokens: copies sorted by expert, grouped products, a weighted sum back.

Nothing is dropped: an expert takes as many tokens as chose it. An expert id of E means "none of these": such copies are
sorted to the end and add nothing. Gradients are written out, so that frozen experts cost nothing in the backward pass
and nothing but the tokens is kept for it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from popax.kernels.grouped_matmul import grouped_outer
from popax.modeling.grouped import grouped_product, grouped_product_back
from popax.modeling.quantised import Weight, dense

# Tokens whose sorted copies are in memory at once: K copies of each, of embed_dim and of expert_ffw_dim features.
CHUNK_TOKENS = 4096


class ExpertWeights(NamedTuple):
    """The MLPs of E experts: y = (silu(x gate) * (x up)) down. Each may be Quantised, and is then not trained."""

    gate_ExDxF: Weight
    up_ExDxF: Weight
    down_ExFxD: Weight

    @property
    def count(self) -> int:
        """E."""
        return jax.tree.leaves(self)[0].shape[0]


class Sorted(NamedTuple):
    """Copies of tokens as R rows sorted by expert. order_R: the copy (token K + k) of a row; place_MxK: its inverse."""

    order_R: jax.Array
    place_MxK: jax.Array
    sizes_E: jax.Array


def sort_copies(expert_MxK: jax.Array, num_experts: int) -> Sorted:
    """A token has each expert at most once, so rows beyond M min(K, E) cannot belong to one and are cut off."""
    tokens, copies = expert_MxK.shape
    flat = expert_MxK.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    bounds = jnp.searchsorted(flat[order], jnp.arange(num_experts, dtype=flat.dtype), side="right").astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)
    rows = tokens * min(copies, num_experts)
    return Sorted(order[:rows], place.reshape(tokens, copies), jnp.diff(bounds, prepend=jnp.zeros(1, jnp.int32)))


def experts_forward(
    x_MxD: jax.Array, expert_MxK: jax.Array, weight_MxK: jax.Array, weights: ExpertWeights
) -> jax.Array:
    """y[m] = sum_k weight[m, k] mlp_{expert[m, k]}(x[m]), [M, D] in x's dtype."""

    weights = _converted(weights, x_MxD)

    def chunk(_: None, x_MxD: jax.Array, expert_MxK: jax.Array, weight_MxK: jax.Array):
        rows = sort_copies(expert_MxK, weights.count)
        gate_RxF, up_RxF = _inner(x_MxD, rows, weights)
        hidden_RxF = _weighted(gate_RxF, up_RxF, _row_weights(rows, weight_MxK))
        out_RxD = grouped_product(hidden_RxF, weights.down_ExFxD, rows.sizes_E)
        return None, _to_tokens(out_RxD, rows)

    return _in_chunks(chunk, None, weights.count, x_MxD, expert_MxK, weight_MxK)[1]


def experts_backward(
    x_MxD: jax.Array,
    expert_MxK: jax.Array,
    weight_MxK: jax.Array,
    weights: ExpertWeights,
    dy_MxD: jax.Array,
    *,
    trained: bool,
) -> tuple[jax.Array, jax.Array, ExpertWeights | None]:
    """The gradients of `experts_forward`: of x, of the weights of the sum, and of the experts where they are trained.

    The hidden features are computed again; the last product of the forward pass is not.
    """

    zeros = jax.tree.map(jnp.zeros_like, weights) if trained else None
    weights = _converted(weights, x_MxD)

    def chunk(sums: ExpertWeights | None, x_MxD, expert_MxK, weight_MxK, dy_MxD):
        rows = sort_copies(expert_MxK, weights.count)
        gate_RxF, up_RxF = _inner(x_MxD, rows, weights)
        hidden_RxF, back = jax.vjp(_weighted, gate_RxF, up_RxF, _row_weights(rows, weight_MxK))
        dy_RxD = _to_rows(dy_MxD, rows)
        dgate_RxF, dup_RxF, dweight_R = back(grouped_product_back(dy_RxD, weights.down_ExFxD, rows.sizes_E))
        dx_RxD = grouped_product_back(dgate_RxF, weights.gate_ExDxF, rows.sizes_E)
        dx_RxD = dx_RxD + grouped_product_back(dup_RxF, weights.up_ExDxF, rows.sizes_E)
        if sums is not None:
            x_RxD = _to_rows(x_MxD, rows)
            pairs = ((x_RxD, dgate_RxF), (x_RxD, dup_RxF), (hidden_RxF, dy_RxD))
            own = ExpertWeights(*(grouped_outer(*pair, rows.sizes_E) for pair in pairs))
            sums = jax.tree.map(lambda total, part: total + part.astype(total.dtype), sums, own)
        dweight_MxK = _gathered(dweight_R[:, None], rows)[..., 0]
        return sums, (_to_tokens(dx_RxD, rows), dweight_MxK.astype(weight_MxK.dtype))

    operands = (x_MxD, expert_MxK, weight_MxK, dy_MxD)
    sums, (dx_MxD, dweight_MxK) = _in_chunks(chunk, zeros, weights.count, *operands)
    return dx_MxD, dweight_MxK, sums


def _converted(weights: ExpertWeights, x_MxD: jax.Array) -> ExpertWeights:
    """In x's dtype where several chunks meet them: a factor for each of all their rows would move more than weights."""
    return ExpertWeights(*(dense(w, x_MxD.dtype) for w in weights)) if x_MxD.shape[0] > CHUNK_TOKENS else weights


def _inner(x_MxD: jax.Array, rows: Sorted, weights: ExpertWeights) -> tuple[jax.Array, jax.Array]:
    x_RxD = _to_rows(x_MxD, rows)
    gate_RxF = grouped_product(x_RxD, weights.gate_ExDxF, rows.sizes_E)
    return gate_RxF, grouped_product(x_RxD, weights.up_ExDxF, rows.sizes_E)


def _weighted(gate_RxF: jax.Array, up_RxF: jax.Array, weight_R: jax.Array) -> jax.Array:
    # The weight enters before the last product: its gradient then needs the hidden features, not the outputs.
    return jax.nn.silu(gate_RxF) * up_RxF * weight_R.astype(gate_RxF.dtype)[:, None]


def _row_weights(rows: Sorted, weight_MxK: jax.Array) -> jax.Array:
    return weight_MxK.reshape(-1)[rows.order_R]


def _to_rows(x_MxD: jax.Array, rows: Sorted) -> jax.Array:
    return x_MxD[rows.order_R // rows.place_MxK.shape[1]]


def _to_tokens(out_RxD: jax.Array, rows: Sorted) -> jax.Array:
    """The sum of each token's rows, in the rows' dtype (jnp.sum adds up what is narrower in float32)."""
    return jnp.sum(_gathered(out_RxD, rows), axis=1)


def _gathered(out_RxD: jax.Array, rows: Sorted) -> jax.Array:
    """[M, K, D]: the row of each copy; zero for a copy of no expert, whose row holds nothing meant."""
    present_MxK = rows.place_MxK < jnp.sum(rows.sizes_E, dtype=jnp.int32)
    picked_MxKxD = out_RxD[jnp.where(present_MxK, rows.place_MxK, 0)]
    return jnp.where(present_MxK[..., None], picked_MxKxD, jnp.zeros((), out_RxD.dtype))


def _in_chunks(chunk: Callable[..., tuple[Any, Any]], carry: Any, none: int, *operands: jax.Array) -> tuple[Any, Any]:
    """chunk(carry, *operands) -> (carry, outputs), over CHUNK_TOKENS tokens at a time where there are more.

    operands: x, expert and others, tokens first. none: the expert id of the tokens that fill up the last chunk.
    """
    tokens = operands[0].shape[0]
    if tokens <= CHUNK_TOKENS:
        return chunk(carry, *operands)
    chunks = -(-tokens // CHUNK_TOKENS)
    fill = chunks * CHUNK_TOKENS - tokens

    def cut(operand: jax.Array) -> jax.Array:
        value = none if jnp.issubdtype(operand.dtype, jnp.integer) else 0
        padded = jnp.pad(operand, ((0, fill), (0, 0)), constant_values=value)
        return padded.reshape(chunks, CHUNK_TOKENS, -1)

    carry, outputs = jax.lax.scan(lambda carry, xs: chunk(carry, *xs), carry, tuple(map(cut, operands)))
    return carry, jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1])[:tokens], outputs)
