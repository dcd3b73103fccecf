"""The op as the rest of popax calls it: the nats of one user's targets under everybody's frozen head."""

import jax

from popax.kernels.cross_entropy import vjp


def token_nll(x: jax.Array, w: jax.Array, target: jax.Array, *, vocab_first: bool) -> jax.Array:
    """logsumexp_v(x . w_v) - x . w_target, the cross-entropy of each target in nats.

    x: [..., D]; w: [V, D] where vocab_first (an embedding table that the head is tied to), else [D, V], of any float
    dtype; target: int [...]. Returns [...] float32 (float64 for x in float64). Products are in x's dtype, sums in
    float32. Every target in [0, V) is valid, and one outside costs infinitely many nats: there is no index that is
    ignored, the caller weighs the rows. Others: torch's cross_entropy skips ignore_index=-100, optax's gives NaN
    outside [0, V).

    Only x has a gradient. One with respect to w raises NotImplementedError. Under `jax.vmap` over users their rows
    become rows of one call; w stays one array.
    """
    leading = x.shape[:-1]
    return vjp.TARGET_NATS[vocab_first](x.reshape(-1, x.shape[-1]), w, target.reshape(-1)).reshape(leading)
