"""What the experts of one device make of tokens: copies sorted by expert, grouped products, a weighted sum back.

Nothing is dropped: an expert takes as many tokens as chose it. Gradients are written out, so that frozen experts cost
nothing in the backward pass and nothing but the tokens is kept for it.

R is rows here (sorted copies of tokens), and Q the rank of adapters' factors.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from popax.kernels.grouped_matmul import grouped_outer
from popax.modeling.expert_factors import SlotRows
from popax.modeling.grouped import grouped_product, grouped_product_back
from popax.modeling.quantised import Weight, dense
from popax.types import ExpertFactors

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


class Values(NamedTuple):
    """What of the tokens is differentiable. weight: of each expert's output in the token's sum.

    gate and up: as in `popax.types.ExpertTerms`; None where no adapter acts.
    """

    x_MxD: jax.Array
    weight_MxK: jax.Array
    gate_MxQ: jax.Array | None = None
    up_MxQ: jax.Array | None = None


class Choice(NamedTuple):
    """expert: int32 in [0, E], E for none of these. slot: int32, of the adapters' factors; None without factors."""

    expert_MxK: jax.Array
    slot_Mx1: jax.Array | None = None


class Outputs(NamedTuple):
    """y[m] = sum_k weight[m, k] mlp_{expert[m, k]}(x[m]), in x's dtype.

    low[m] = sum_k weight[m, k] hidden[m, k] factors.down[slot of m, expert[m, k]]^T; None without that factor.
    """

    y_MxD: jax.Array
    low_MxQ: jax.Array | None = None


def experts_forward(
    values: Values,
    choice: Choice,
    weights: ExpertWeights,
    factors: ExpertFactors | None = None,
    *,
    stretch: int | None = None,
) -> Outputs:
    """The outputs of E experts. stretch: tokens are in stretches of so many with one slot; None for any order."""

    weights = _converted(weights, values.x_MxD)

    def chunk(_: None, values: Values, choice: Choice):
        own = SlotRows.of(*choice, weights.count, factors, stretch)
        gate_RxF, up_RxF = _inner(values, weights, own)
        hidden_RxF = _weighted(gate_RxF, up_RxF, own.rows.of_copies(values.weight_MxK))
        out_RxD = grouped_product(hidden_RxF, weights.down_ExFxD, own.rows.sizes_E)
        return None, Outputs(own.rows.to_tokens(out_RxD), own.to_low(hidden_RxF, own.down))

    return _in_chunks(chunk, None, weights.count, values, choice)[1]


def experts_backward(
    values: Values,
    choice: Choice,
    weights: ExpertWeights,
    factors: ExpertFactors | None,
    cotangent: Outputs,
    *,
    trained: bool,
    stretch: int | None = None,
) -> tuple[Values, ExpertWeights | None, ExpertFactors | None]:
    """The gradients of `experts_forward`: of the values, of the weights where they are trained, of the factors.

    The hidden features are computed again; the last product of the forward pass is not.
    """

    zeros = (jax.tree.map(jnp.zeros_like, weights) if trained else None, jax.tree.map(jnp.zeros_like, factors))
    weights = _converted(weights, values.x_MxD)

    def chunk(sums, values: Values, choice: Choice, cotangent: Outputs):
        weight_sums, factor_sums = sums
        own = SlotRows.of(*choice, weights.count, factors, stretch)
        rows = own.rows
        gate_RxF, up_RxF = _inner(values, weights, own)
        hidden_RxF, back = jax.vjp(_weighted, gate_RxF, up_RxF, rows.of_copies(values.weight_MxK))
        dy_RxD = rows.of_tokens(cotangent.y_MxD)
        dhidden_RxF = grouped_product_back(dy_RxD, weights.down_ExFxD, rows.sizes_E)
        dgate_RxF, dup_RxF, dweight_R = back(own.added(dhidden_RxF, cotangent.low_MxQ, own.down))
        dx_RxD = grouped_product_back(dgate_RxF, weights.gate_ExDxF, rows.sizes_E)
        dx_RxD = dx_RxD + grouped_product_back(dup_RxF, weights.up_ExDxF, rows.sizes_E)
        if weight_sums is not None:
            x_RxD = rows.of_tokens(values.x_MxD)
            pairs = ((x_RxD, dgate_RxF), (x_RxD, dup_RxF), (hidden_RxF, dy_RxD))
            parts = ExpertWeights(*(grouped_outer(*pair, rows.sizes_E) for pair in pairs))
            weight_sums = jax.tree.map(lambda total, part: total + part.astype(total.dtype), weight_sums, parts)
        if factor_sums is not None:
            pairs = ((values.gate_MxQ, dgate_RxF), (values.up_MxQ, dup_RxF), (cotangent.low_MxQ, hidden_RxF))
            factor_sums = own.add_gradients(factor_sums, *pairs)
        dweight_MxK = rows.to_copies(dweight_R[:, None])[..., 0].astype(values.weight_MxK.dtype)
        lows = (own.to_low(dgate_RxF, own.gate), own.to_low(dup_RxF, own.up))
        return (weight_sums, factor_sums), Values(rows.to_tokens(dx_RxD), dweight_MxK, *lows)

    operands = (values, choice, cotangent)
    (weight_sums, factor_sums), gradients = _in_chunks(chunk, zeros, weights.count, *operands)
    return gradients, weight_sums, factor_sums


def _converted(weights: ExpertWeights, x_MxD: jax.Array) -> ExpertWeights:
    """In x's dtype where several chunks meet them: a factor for each of all their rows would move more than weights."""
    return ExpertWeights(*(dense(w, x_MxD.dtype) for w in weights)) if x_MxD.shape[0] > CHUNK_TOKENS else weights


def _inner(values: Values, weights: ExpertWeights, own: SlotRows) -> tuple[jax.Array, jax.Array]:
    x_RxD, sizes_E = own.rows.of_tokens(values.x_MxD), own.rows.sizes_E
    gate_RxF = grouped_product(x_RxD, weights.gate_ExDxF, sizes_E)
    up_RxF = grouped_product(x_RxD, weights.up_ExDxF, sizes_E)
    return own.added(gate_RxF, values.gate_MxQ, own.gate), own.added(up_RxF, values.up_MxQ, own.up)


def _weighted(gate_RxF: jax.Array, up_RxF: jax.Array, weight_R: jax.Array) -> jax.Array:
    # The weight enters before the last product: its gradient then needs the hidden features, not the outputs.
    return jax.nn.silu(gate_RxF) * up_RxF * weight_R.astype(gate_RxF.dtype)[:, None]


def _in_chunks(chunk: Callable[..., tuple[Any, Any]], carry: Any, none: int, *operands: Any) -> tuple[Any, Any]:
    """chunk(carry, *operands) -> (carry, outputs), over CHUNK_TOKENS tokens at a time where there are more.

    operands: trees of arrays with tokens first. none: the expert id of the tokens that fill up the last chunk.
    """
    tokens = jax.tree.leaves(operands)[0].shape[0]
    if tokens <= CHUNK_TOKENS:
        return chunk(carry, *operands)
    chunks = -(-tokens // CHUNK_TOKENS)
    fill = chunks * CHUNK_TOKENS - tokens

    def cut(operand: jax.Array) -> jax.Array:
        return padded(operand, fill, none).reshape(chunks, CHUNK_TOKENS, -1)

    carry, outputs = jax.lax.scan(lambda carry, xs: chunk(carry, *xs), carry, jax.tree.map(cut, operands))
    return carry, jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1])[:tokens], outputs)


def padded(operand: jax.Array, fill: int, none: int) -> jax.Array:
    """`fill` more tokens that go to no expert: `none` among integers, zero among the rest."""
    value = none if jnp.issubdtype(operand.dtype, jnp.integer) else 0
    return jnp.pad(operand, ((0, fill), (0, 0)), constant_values=value)
