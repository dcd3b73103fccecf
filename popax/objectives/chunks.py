"""Something of each token that needs its logits, a few tokens at a time: all of them never exist at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def in_chunks(function: Callable[..., jax.Array], chunk: int, *arrays_BxTxD: jax.Array) -> jax.Array:
    """function of so many tokens at a time, put together again [B, T]; its intermediates are made anew for a gradient.

    function takes [B, C, D] of each array and gives [B, C].
    """
    function, length = jax.checkpoint(function), arrays_BxTxD[0].shape[1]
    if length <= chunk:
        return function(*arrays_BxTxD)
    missing = -length % chunk

    def cut(x_BxTxD: jax.Array) -> jax.Array:
        padded = jnp.pad(x_BxTxD, ((0, 0), (0, missing), (0, 0)))
        return jnp.moveaxis(padded.reshape(padded.shape[0], -1, chunk, padded.shape[-1]), 1, 0)

    parts_KxBxC = jax.lax.map(lambda pieces: function(*pieces), tuple(map(cut, arrays_BxTxD)))
    return jnp.moveaxis(parts_KxBxC, 0, 1).reshape(parts_KxBxC.shape[1], -1)[:, :length]
