"""Cross-entropy of next tokens: of logits that exist, and of hidden states under a head that is everybody's."""

import functools

import jax
import jax.numpy as jnp

from popax.kernels.cross_entropy import token_nll
from popax.modeling.context_parallel import token_by_token
from popax.sharding import ShardingRules


def cross_entropy(logits_BxTxV: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in nats, [B, T] float32."""
    logits_BxTxV = logits_BxTxV.astype(jnp.float32)
    picked_BxT = jnp.take_along_axis(logits_BxTxV, targets_BxT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BxTxV, axis=-1) - picked_BxT


def frozen_head_nats(
    x: jax.Array, targets: jax.Array, weight: jax.Array, rules: ShardingRules, *, vocab_first: bool
) -> jax.Array:
    """The same of logits x w, which never exist as a whole: x [..., D] to [...] float32.

    rules: as in Model; x [B, T, D] may be cut along its tokens. weight: [V, D] where vocab_first, else [D, V]. A
    gradient with respect to it raises NotImplementedError.
    """
    return token_by_token(functools.partial(token_nll, vocab_first=vocab_first), rules)(x, weight, targets)
