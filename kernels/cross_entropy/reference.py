"""The op in plain XLA, some rows at a time: the oracle of every other implementation, and the CPU path.

The rows are cut and not the vocabulary: a chunk then sees all of its logits, so that its softmax needs no second look
and no rescaling, the target's column is part of the same product, and a head whose vocabulary is spread over devices
stays where it is.

The target is left out of the softmax's sums. With p its probability, the gradient's weight on the target's row of the
head is p - 1 = -s / Z, where s sums the *other* exponentials: exact when p -> 1, where a p that was rounded to bfloat16
would leave an error of up to 2^-9 |w_target| in place of a gradient that goes to zero.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from popax.kernels import dispatch

# Entries of a chunk of logits, on each replica of the population: half a gigabyte in float32.
MOST_LOGITS = 1 << 27


def nats(
    x_MxD: jax.Array,
    w: jax.Array,
    target_M: jax.Array,
    *,
    vocab_first: bool,
    most_logits: int = MOST_LOGITS,
    unroll: bool = False,
) -> tuple[jax.Array]:
    """(logsumexp_v(x . w_v) - x . w_target,): [M], in 2 M V D FLOPs. most_logits: see `chunks`.

    unroll: without a loop over the chunks, whose body the TPU compiler counts once.
    """

    def some(x_mxD: jax.Array, target_m: jax.Array) -> tuple[jax.Array]:
        return (_softmax(x_mxD, w, target_m, vocab_first)[0],)

    return _by_rows(some, x_MxD, target_M, w.shape[0 if vocab_first else 1], most_logits, unroll)


def nats_and_gradient(
    x_MxD: jax.Array,
    w: jax.Array,
    target_M: jax.Array,
    *,
    vocab_first: bool,
    most_logits: int = MOST_LOGITS,
    unroll: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(nats_M, d nats / d x = sum_v p_v w_v - w_target): the second [M, D] in x's dtype. 4 M V D FLOPs.

    The gradient is made here and not in a backward pass, which would have to make the logits again: 6 M V D.
    """

    def some(x_mxD: jax.Array, target_m: jax.Array) -> tuple[jax.Array, jax.Array]:
        nats_m, weight_mxV, total_mx1 = _softmax(x_mxD, w, target_m, vocab_first)
        product = "mv,vd->md" if vocab_first else "mv,dv->md"
        sum_mxD = _contract(product, weight_mxV.astype(x_mxD.dtype), w)
        return nats_m, (sum_mxD / total_mx1).astype(x_mxD.dtype)

    return _by_rows(some, x_MxD, target_M, w.shape[0 if vocab_first else 1], most_logits, unroll)


def chunks(rows: int, vocab: int, most_logits: int = MOST_LOGITS) -> int:
    """Into how many equal parts the rows are cut, so that a part has at most most_logits logits (or is one row).

    1 where all rows have no more. At most twice as many parts as necessary are made if they divide the rows.
    """
    necessary = -(-rows // max(most_logits // vocab, 1))
    return next((count for count in range(necessary, 2 * necessary) if rows % count == 0), necessary)


def _by_rows(some: Callable[..., tuple], x_MxD, target_M, vocab: int, most_logits: int, unroll: bool) -> Any:
    """some(x, target) on all rows, one chunk after the other."""
    rows, d_in = x_MxD.shape
    # Each chunk may gather the head: their number must not grow with the replicas, each of which has a part of it.
    count = chunks(rows, vocab, most_logits * dispatch.replicas())
    if count <= 1:
        return some(x_MxD, target_M)
    # Chunk c has the rows c, c + count, ...: where users are spread over devices, each device has its share of every
    # chunk.
    padding = -rows % count
    x_mxCxD = jnp.pad(x_MxD, ((0, padding), (0, 0))).reshape(-1, count, d_in)
    target_mxC = jnp.pad(target_M, (0, padding)).reshape(-1, count)

    def chunk(carry: None, at: jax.Array):
        operands = (jax.lax.dynamic_index_in_dim(each, at, 1, keepdims=False) for each in (x_mxCxD, target_mxC))
        return carry, some(*operands)

    _, outputs = jax.lax.scan(chunk, None, jnp.arange(count), unroll=unroll or 1)
    return tuple(output.swapaxes(0, 1).reshape(-1, *output.shape[2:])[:rows] for output in outputs)


def _softmax(x_MxD: jax.Array, w: jax.Array, target_M: jax.Array, vocab_first: bool):
    """(nats, weights, Z): [M], [M, V], [M, 1], where weights / Z is d nats / d logits."""
    logits_MxV = _contract("md,vd->mv" if vocab_first else "md,dv->mv", x_MxD, w)
    own_MxV = jax.lax.broadcasted_iota(target_M.dtype, logits_MxV.shape, 1) == target_M[:, None]
    top_Mx1 = jnp.max(logits_MxV, axis=1, keepdims=True)
    target_Mx1 = jnp.max(jnp.where(own_MxV, logits_MxV, -jnp.inf), axis=1, keepdims=True)
    exp_MxV = jnp.where(own_MxV, 0.0, jnp.exp(logits_MxV - top_Mx1))
    others_Mx1 = jnp.sum(exp_MxV, axis=1, keepdims=True)
    nats_Mx1, total_Mx1 = finish(top_Mx1, target_Mx1, others_Mx1)
    return nats_Mx1[:, 0], jnp.where(own_MxV, -others_Mx1, exp_MxV), total_Mx1


def finish(top: jax.Array, target: jax.Array, others: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(nats, Z) from the largest logit, the target's, and others = the sum over the other v of exp(logit_v - top).

    Where the target is the largest, nats = log(1 + others) keeps every digit of a small one.
    """
    total = others + jnp.exp(target - top)
    return jnp.where(target >= top, jnp.log1p(others), jnp.log(total) + (top - target)), total


def _contract(subscripts: str, left: jax.Array, w: jax.Array) -> jax.Array:
    accumulate = jnp.float64 if left.dtype == jnp.float64 else jnp.float32
    return jnp.einsum(subscripts, left, w.astype(left.dtype), preferred_element_type=accumulate)
