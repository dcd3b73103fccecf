"""The op with its gradient, which the forward pass makes; under `jax.vmap` the users' rows become rows of one call."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from popax.kernels import dispatch
from popax.kernels.cross_entropy.arg_specs import ArgSpec
from popax.kernels.cross_entropy.ops import BY_LAYOUT
from popax.kernels.op import Op

Rows = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]


def _folding(op: Op, vocab_axis: int) -> Rows:
    """The op on rows [M, D], whose vmap has N M rows and the same w."""

    @custom_vmap
    def rows(x_MxD, w, target_M):
        return dispatch.run(
            op.name,
            op.implementations,
            ArgSpec("", rows=x_MxD.shape[0], embed=x_MxD.shape[1], vocab=w.shape[vocab_axis]),
            x_MxD,
            w,
            target_M,
            dtype=x_MxD.dtype.name,
            population=(True, False, True),
            block_types=op.block_types,
        )

    @rows.def_vmap
    def fold(axis_size, in_batched, x, w, target):
        x_batched, w_batched, target_batched = in_batched
        x = x if x_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
        target = target if target_batched else jnp.broadcast_to(target, (axis_size, *target.shape))
        if w_batched:
            outputs = jax.lax.map(lambda operands: rows(*operands), (x, w, target))
        else:
            outputs = rows(x.reshape(-1, x.shape[-1]), w, target.reshape(-1))
            outputs = tuple(output.reshape(axis_size, -1, *output.shape[1:]) for output in outputs)
        return outputs, (True,) * len(outputs)

    return rows


def _with_gradient(nats: Rows, nats_and_gradient: Rows) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    @jax.custom_vjp
    def token_nll(x_MxD, w, target_M):
        return nats(x_MxD, w, target_M)[0]

    def forward(x_MxD, w, target_M):
        if w.perturbed:
            raise NotImplementedError(
                "cross_entropy has no gradient for the head's weight, which is frozen: train a base on whole logits, "
                "or stop the gradient of the weight"
            )
        nats_M, gradient_MxD = nats_and_gradient(x_MxD.value, w.value, target_M.value)
        return nats_M, gradient_MxD

    def backward(gradient_MxD: jax.Array, g_M: jax.Array | SymbolicZero):
        if isinstance(g_M, SymbolicZero):
            return None, None, None
        dx_MxD = g_M[:, None] * gradient_MxD.astype(g_M.dtype)
        return dx_MxD.astype(gradient_MxD.dtype), None, None

    # Symbolic zeros say which operands somebody differentiates.
    token_nll.defvjp(forward, backward, symbolic_zeros=True)
    return token_nll


# By whether the vocabulary is w's first axis: logsumexp_v(x . w_v) - x . w_target, [M]. Without a gradient only the
# nats are computed.
TARGET_NATS = {
    vocab_first: _with_gradient(*(_folding(ops[vocab_first], vocab_axis) for ops in BY_LAYOUT))
    for vocab_first, vocab_axis in ((True, 0), (False, 1))
}
