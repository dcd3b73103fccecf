"""What a token of a packed row sees, and attention written out: the oracle, with memory in the square of the row."""

import jax
import jax.numpy as jnp

# Below any score, and finite: a difference of two of them is 0 and not NaN.
LOWEST = -1e30


def sees(query_segments: jax.Array, key_segments: jax.Array, query_at: jax.Array, key_at: jax.Array) -> jax.Array:
    """bool [..., T, S]: whether the query at a place of its row sees the key at another one.

    Itself and earlier tokens of its own segment; of segments below 0, which stand in front of a row, also the tokens of
    every text (a segment above 0). Segment 0 is padding: it sees nothing, and is seen by nothing.

    segments: int32 [..., T] and [..., S]. at: int32 [T] and [S], places in the row.
    """
    query, key = query_segments[..., :, None], key_segments[..., None, :]
    same = (query == key) & (query != 0)
    earlier = key_at[None, :] <= query_at[:, None]
    return (same | ((key < 0) & (query > 0))) & jnp.broadcast_to(earlier, same.shape)


def packed_attention(
    q_BxKxGxTxd: jax.Array, k_BxKxTxd: jax.Array, v_BxKxTxe: jax.Array, segments_BxT: jax.Array, scale: float
) -> jax.Array:
    """softmax(scale q k^T) v over the keys that each query sees, [B, K, G, T, e]; 0 where it sees none."""
    at_T = jnp.arange(segments_BxT.shape[1])
    seen = sees(segments_BxT, segments_BxT, at_T, at_T)[:, None, None]
    scores = jnp.einsum("bkgtd,bksd->bkgts", q_BxKxGxTxd, k_BxKxTxd, preferred_element_type=jnp.float32)
    scores = jnp.where(seen, scores * jnp.float32(scale), LOWEST)
    weights = jnp.where(seen, jax.nn.softmax(scores, axis=-1), 0.0).astype(v_BxKxTxe.dtype)
    return jnp.einsum("bkgts,bkse->bkgte", weights, v_BxKxTxe)
