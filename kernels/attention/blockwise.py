"""Attention in blocks of queries and keys: no more than one block of scores exists at a time, in either pass.

Forward: the online softmax of FlashAttention (arXiv 2205.14135, algorithm 1). Backward: its algorithm 4, by the log of
each query's sum of exponentials, which is kept. Keys after a block of queries are never met.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from popax.kernels.attention.reference import LOWEST, sees


class Static(NamedTuple):
    """scale: on the scores. block: tokens of a block, which divides the row."""

    scale: float
    block: int


class _Row(NamedTuple):
    """Operands of which blocks are cut: [B, K, G, T, d], [B, K, T, d], [B, K, T, e], [B, T]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    segments: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, static: Static) -> jax.Array:
    """As `reference.packed_attention`; T is a multiple of static.block."""
    return _forward(_Row(q, k, v, segments), static)[0]


def _cut(x: jax.Array, axis: int, index: jax.Array, block: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis)


def _scores(row: _Row, q_i: jax.Array, i: jax.Array, j: jax.Array, static: Static) -> tuple[jax.Array, jax.Array]:
    """(scaled float32 scores [B, K, G, t, s] of a block of queries with a block of keys, which of them count)."""
    scores = jnp.einsum("bkgtd,bksd->bkgts", q_i, _cut(row.k, 2, j, static.block), preferred_element_type=jnp.float32)
    inside = jnp.arange(static.block)
    seen = sees(
        _cut(row.segments, 1, i, static.block),
        _cut(row.segments, 1, j, static.block),
        i * static.block + inside,
        j * static.block + inside,
    )
    return scores * jnp.float32(static.scale), seen[:, None, None]


def _forward(row: _Row, static: Static) -> tuple[jax.Array, jax.Array]:
    """(attention [B, K, G, T, e] in v's dtype, log of the sum of exponentials [B, K, G, T], LOWEST where nothing)."""
    blocks = row.segments.shape[1] // static.block

    def queries(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        q_i = _cut(row.q, 3, i, static.block)
        shape = q_i.shape[:-1]

        def keys(j, so_far):
            top, total, summed = so_far
            scores, seen = _scores(row, q_i, i, j, static)
            scores = jnp.where(seen, scores, LOWEST)
            higher = jnp.maximum(top, jnp.max(scores, axis=-1))
            shrink = jnp.exp(top - higher)
            weights = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0.0)
            v_j = _cut(row.v, 2, j, static.block)
            more = jnp.einsum("bkgts,bkse->bkgte", weights.astype(v_j.dtype), v_j, preferred_element_type=jnp.float32)
            return higher, total * shrink + jnp.sum(weights, axis=-1), summed * shrink[..., None] + more

        start = (
            jnp.full(shape, LOWEST, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, row.v.shape[-1]), jnp.float32),
        )
        top, total, summed = jax.lax.fori_loop(0, i + 1, keys, start)
        some = jnp.where(total > 0, total, 1.0)
        return (summed / some[..., None]).astype(row.v.dtype), jnp.where(total > 0, top + jnp.log(some), LOWEST)

    out, log_sum = jax.lax.map(queries, jnp.arange(blocks))
    return _joined(out), _joined(log_sum)


def _joined(parts: jax.Array) -> jax.Array:
    """[blocks, B, K, G, t, ...] -> [B, K, G, T, ...]."""
    parts = jnp.moveaxis(parts, 0, 3)
    return parts.reshape(*parts.shape[:3], -1, *parts.shape[5:])


def _kept(q, k, v, segments, static: Static):
    out, log_sum = _forward(_Row(q, k, v, segments), static)
    return out, (_Row(q, k, v, segments), out, log_sum)


def _backward(static: Static, kept, d_out: jax.Array):
    row, out, log_sum = kept
    # sum_s weight_s d weight_s of each query, by its output.
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    blocks = row.segments.shape[1] // static.block

    def queries(i, gradients):
        q_i, d_out_i = _cut(row.q, 3, i, static.block), _cut(d_out, 3, i, static.block)
        log_sum_i, inner_i = _cut(log_sum, 3, i, static.block), _cut(inner, 3, i, static.block)

        def keys(j, so_far):
            d_q_i, d_k, d_v = so_far
            k_j, v_j = _cut(row.k, 2, j, static.block), _cut(row.v, 2, j, static.block)
            scores, seen = _scores(row, q_i, i, j, static)
            weights = jnp.where(seen, jnp.exp(scores - log_sum_i[..., None]), 0.0)
            d_weights = jnp.einsum("bkgte,bkse->bkgts", d_out_i, v_j, preferred_element_type=jnp.float32)
            d_scores = (weights * (d_weights - inner_i[..., None]) * jnp.float32(static.scale)).astype(q_i.dtype)
            add = functools.partial(_added, j=j, block=static.block)
            wide = {"preferred_element_type": jnp.float32}
            d_v = add(d_v, jnp.einsum("bkgts,bkgte->bkse", weights.astype(d_out_i.dtype), d_out_i, **wide))
            d_k = add(d_k, jnp.einsum("bkgts,bkgtd->bksd", d_scores, q_i, **wide))
            return d_q_i + jnp.einsum("bkgts,bksd->bkgtd", d_scores, k_j, **wide), d_k, d_v

        d_q, d_k, d_v = gradients
        d_q_i, d_k, d_v = jax.lax.fori_loop(0, i + 1, keys, (jnp.zeros(q_i.shape, jnp.float32), d_k, d_v))
        return jax.lax.dynamic_update_slice_in_dim(d_q, d_q_i.astype(d_q.dtype), i * static.block, 3), d_k, d_v

    start = (jnp.zeros_like(row.q), jnp.zeros(row.k.shape, jnp.float32), jnp.zeros(row.v.shape, jnp.float32))
    d_q, d_k, d_v = jax.lax.fori_loop(0, blocks, queries, start)
    return d_q, d_k.astype(row.k.dtype), d_v.astype(row.v.dtype), None


def _added(whole: jax.Array, part: jax.Array, *, j: jax.Array, block: int) -> jax.Array:
    """whole [B, K, T, ...] with the part added to its j-th block."""
    return jax.lax.dynamic_update_slice_in_dim(whole, _cut(whole, 2, j, block) + part, j * block, 2)


blockwise.defvjp(_kept, _backward)
