"""The low-rank update of flat rows on GPU, forward and backward, from the grouped products of popax.kernels.triton."""

from typing import Any

import jax
import jax.numpy as jnp

from popax.kernels.triton import Blocks, Runs, Tiles, expand, outer, outer_shrink, ranks, shrink


def forward(
    x_MxD: jax.Array,
    a_SxRxD: jax.Array,
    b_SxRxF: jax.Array,
    scale_S: jax.Array,
    tiles: Tiles,
    rank_S: jax.Array | None,
    y_MxF: jax.Array | None,
    blocks: Blocks,
    *,
    name: str,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """(y + s h^T B, h_RxM = A x^T), each row with its tile's slot; h in x's dtype."""
    h_RxM = shrink(x_MxD, a_SxRxD, tiles, rank_S, blocks, name=f"{name}_shrink", interpret=interpret)
    expanded = (h_RxM, b_SxRxF, scale_S, tiles, rank_S, y_MxF, blocks)
    return expand(*expanded, name=f"{name}_expand", interpret=interpret), h_RxM


def backward(
    g_MxF: jax.Array,
    x_MxD: jax.Array,
    h_RxM: jax.Array,
    a_SxRxD: jax.Array,
    b_SxRxF: jax.Array,
    scale_S: jax.Array,
    tiles: Tiles,
    runs: Runs,
    rank_S: jax.Array | None,
    blocks: Blocks,
    *,
    name: str,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(dx, dA, dB, gb_RxM = B g^T). gb holds anything where a row has no adapter or beyond its rank."""
    g_MxF, rank_S = g_MxF.astype(x_MxD.dtype), ranks(rank_S, a_SxRxD)
    by_slot = (runs, rank_S, scale_S, blocks)
    outer_options = {"name": f"{name}_outer", "interpret": interpret}
    if blocks.joint:
        joint = (h_RxM, g_MxF, b_SxRxF, *by_slot)
        db_SxRxF, gb_RxM = outer_shrink(*joint, name=f"{name}_outer_shrink", interpret=interpret)
    else:
        db_SxRxF = outer(h_RxM, g_MxF, *by_slot, dtype=b_SxRxF.dtype, **outer_options)
        gb_RxM = shrink(g_MxF, b_SxRxF, tiles, rank_S, blocks, name=f"{name}_shrink", interpret=interpret)
    expanded = (gb_RxM, a_SxRxD, scale_S, tiles, rank_S, None, blocks)
    dx_MxD = expand(*expanded, name=f"{name}_expand", interpret=interpret)
    da_SxRxD = outer(gb_RxM, x_MxD, *by_slot, dtype=a_SxRxD.dtype, **outer_options)
    return dx_MxD, da_SxRxD, db_SxRxF, gb_RxM


def candidates(tokens: int, rank: int, *, backward: bool) -> tuple[Blocks, ...]:
    """Block sizes that are worth a clock, likely ones first. tokens: consecutive rows of one slot."""
    if tokens == 1:
        return tuple(Blocks(1, block, warps, 1) for block in (512, 1024) for warps in (4, 8))
    tiles = [tile for tile in (64, 32, 128) if tile <= tokens] or [16]
    # Only a backward pass has joint passes.
    joints = () if not backward else (512, 256, 0) if rank <= 16 else (256, 128, 0)
    shapes = [(tile, block, warps) for tile in tiles for block, warps in ((128, 4), (64, 4), (256, 8))]
    # The first tile with every joint pass, and the other tiles with the first one.
    return tuple(
        Blocks(tile, block, warps, 3, 1, joint)
        for tile, block, warps in shapes
        for joint in ((joints if tile == tiles[0] else joints[:1]) or (0,))
        # Three stages of a tall tile and of a wide rank's factor are more than the shared memory of a processor.
        if rank <= 16 or tile * block <= 128 * 128
    )


def check(x: jax.Array) -> None:
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"x is {x.dtype}; the GPU form accumulates in float32: float32, bfloat16, float16")
