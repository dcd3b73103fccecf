"""The op as the rest of popax calls it."""

import jax
import jax.numpy as jnp

from popax.kernels.attention.blockwise import Static, blockwise

# Measured on two CPU cores, forward and backward, 8/4 heads of 64: 1,024 tokens in 138, 150 and 292 ms with blocks of
# 128, 256 and 512, 4,096 in 2.4, 2.6 and 3.3 s.
BLOCK = 128


def packed_attention(
    q_BxKxGxTxd: jax.Array,
    k_BxKxTxd: jax.Array,
    v_BxKxTxe: jax.Array,
    segments_BxT: jax.Array,
    *,
    scale: float,
    block: int = BLOCK,
) -> jax.Array:
    """softmax(scale q k^T) v over the keys that each query sees (`sees`), [B, K, G, T, e] in v's dtype; 0 where none.

    Group g of kv head k reads its keys, which are not repeated in memory. Both passes need memory linear in T beside
    one block of scores, [B, K, G, block, block] float32. The softmax is float32; gradients reach q, k and v.
    """
    length = segments_BxT.shape[1]
    missing = -length % block

    def padded(x: jax.Array, axis: int) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, missing)
        return jnp.pad(x, widths) if missing else x

    out: jax.Array = blockwise(  # pyright: ignore[reportAssignmentType] - custom_vjp's type says object
        padded(q_BxKxGxTxd, 3),
        padded(k_BxKxTxd, 2),
        padded(v_BxKxTxe, 2),
        padded(segments_BxT, 1),
        Static(scale, block),
    )
    return out[..., :length, :]
