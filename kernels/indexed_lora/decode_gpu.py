"""Decode on GPU: each token's adapter rows stream through the plain units, or a tile of one slot's tokens at a time."""

import jax
import jax.numpy as jnp

from popax.kernels.indexed_lora.reference_decode import Site
from popax.kernels.triton import MIN_DOT, Blocks, expand, shrink, sorted_tiles


def decode(
    x_TxD: jax.Array,
    sites: tuple[Site, ...],
    scale: tuple[jax.Array, ...],
    slot_T: jax.Array,
    rank_S: jax.Array | None = None,
    *,
    blocks: Blocks | None = None,
    interpret=False,
) -> tuple[jax.Array, ...]:
    """out_t = y_t + s (x_t A[slot_t]^T) B[slot_t] for every site: `reference_decode.decode`.

    Tokens are read through their order by slot; adapters are never gathered. Two launches a site. Raises
    NotImplementedError for float64.
    """
    if x_TxD.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"x is {x_TxD.dtype}; the GPU form takes float32, bfloat16 and float16")
    slots = sites[0][0].shape[0]
    blocks = blocks or default_blocks(x_TxD.shape[0], slots)
    tiles = sorted_tiles(slot_T, slots, blocks.tile)
    outputs = []
    for (a_SxRxD, b_SxRxF, y_TxF), scale_S in zip(sites, scale, strict=True):
        h_RxT = shrink(
            x_TxD, a_SxRxD, tiles, rank_S, blocks, name="popax_indexed_lora_decode_shrink", interpret=interpret
        )
        out_TxF = expand(
            *(h_RxT, b_SxRxF, scale_S, tiles, rank_S, y_TxF, blocks),
            name="popax_indexed_lora_decode_expand",
            interpret=interpret,
        )
        outputs.append(out_TxF)
    return tuple(outputs)


def default_blocks(tokens: int, slots: int) -> Blocks:
    """Until a device has been tuned: tiles where tokens must share slots, single rows where they need not."""
    if tokens >= 4 * slots:
        return Blocks(tile=MIN_DOT, block=128, warps=4, stages=4)
    return Blocks(tile=1, block=256, warps=4, stages=4)
