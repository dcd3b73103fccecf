"""The op as the rest of popax calls it: one user's core, or groups of tokens with the slot of their user's."""

import jax
import jax.numpy as jnp

from popax.kernels import dispatch, target
from popax.kernels.shared_core import reference, vjp


def shared_core(
    x: jax.Array,
    a_RxD: jax.Array,
    b_RxF: jax.Array,
    core: jax.Array,
    scale: jax.Array,
    y: jax.Array | None = None,
) -> jax.Array:
    """y + s core(x A^T) B for one user; without y the update alone.

    core(h) is h C^T for C [R, R], h * d for d [R]. x: [..., D]; a: [R, D] and b: [R, F], frozen; scale: scalar array;
    y: [..., F]. Returns [..., F] in y's dtype, or in x's without y. Under `jax.vmap` over users it becomes one stacked
    op, forward and backward, in which a and b stay one copy. Raises TypeError where a derivative by a or b is asked
    for. LoRA-XS, arXiv 2405.17604; VeRA, arXiv 2310.11454.
    """
    d_out = b_RxF.shape[-1]
    y_TxF = None if y is None else y.reshape(-1, d_out)
    if target.platform() not in dispatch.BACKENDS:
        a_RxD, b_RxF = vjp.frozen(a_RxD, b_RxF)
        out_TxF = reference.one_user(x.reshape(-1, x.shape[-1]), a_RxD, b_RxF, core, scale, y_TxF)
        return out_TxF.reshape(*x.shape[:-1], d_out)
    out_TxF = vjp.shared_core(x.reshape(-1, x.shape[-1]), a_RxD, b_RxF, core, scale, y_TxF)
    return out_TxF.reshape(*x.shape[:-1], d_out)


def indexed_shared_core(
    x_GxTxD: jax.Array,
    a_RxD: jax.Array,
    b_RxF: jax.Array,
    core_S: jax.Array,
    scale: jax.Array,
    slot_G: jax.Array,
    y_GxTxF: jax.Array,
    rank_S: jax.Array | None = None,
) -> jax.Array:
    """y_g + s core[slot_g](x_g A^T) B; y's very bytes where the slot is -1 or out of range.

    core: [S, R, R] or [S, R]; slot: int [G], a group of T tokens shares it; rank: int [S], a core's entries beyond it
    count as zero, whatever they hold. The other operands, and the error, as in `shared_core`. Returns [G, T, F] in y's
    dtype.
    """
    if target.platform() not in dispatch.BACKENDS:
        a_RxD, b_RxF = vjp.frozen(a_RxD, b_RxF)
        return reference.grouped(x_GxTxD, a_RxD, b_RxF, core_S, scale, slot_G, rank_S, y_GxTxF)
    (groups, tokens, d_in), d_out = x_GxTxD.shape, b_RxF.shape[1]
    slots, rank = core_S.shape[:2]
    rank_S = jnp.full((slots,), rank, jnp.int32) if rank_S is None else rank_S.astype(jnp.int32)
    out_MxF = vjp.indexed(
        groups,
        x_GxTxD.reshape(-1, d_in),
        a_RxD,
        b_RxF,
        core_S,
        jnp.broadcast_to(scale, (slots,)),
        jnp.repeat(slot_G.astype(jnp.int32), tokens),
        rank_S,
        y_GxTxF.reshape(-1, d_out),
    )
    return out_MxF.reshape(groups, tokens, d_out)
