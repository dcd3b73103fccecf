"""The stacked op on GPU: grouped products in Pallas-Triton over users of equal length."""

from typing import Any

import jax
import jax.numpy as jnp

from popax.kernels import triton_lora
from popax.kernels.triton import Blocks, stacked_runs, stacked_tiles

NAME = "popax_stacked_lora"


def forward(
    x_NxTxD: jax.Array,
    a_NxRxD: jax.Array,
    b_NxRxF: jax.Array,
    scale_N: jax.Array,
    y_NxTxF: jax.Array | None = None,
    *,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """(y + delta, h_NxRxT), as `reference.forward`. Raises NotImplementedError for float64."""
    triton_lora.check(x_NxTxD)
    users, tokens, _ = x_NxTxD.shape
    blocks = blocks or default_blocks(tokens)
    tiles = stacked_tiles(users, tokens, blocks.tile)
    y_MxF = None if y_NxTxF is None else _flat(y_NxTxF)
    out_MxF, h_RxM = triton_lora.forward(
        *(_flat(x_NxTxD), a_NxRxD, b_NxRxF, scale_N, tiles, None, y_MxF, blocks), name=NAME, interpret=interpret
    )
    return out_MxF.reshape(users, tokens, -1), h_RxM.reshape(-1, users, tokens).transpose(1, 0, 2)


def backward(
    g_NxTxF: jax.Array,
    x_NxTxD: jax.Array,
    h_NxRxT: jax.Array,
    a_NxRxD: jax.Array,
    b_NxRxF: jax.Array,
    scale_N: jax.Array,
    *,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(dx, dA, dB, ds), as `reference.backward`. Raises NotImplementedError for float64."""
    triton_lora.check(x_NxTxD)
    users, tokens, _ = x_NxTxD.shape
    blocks = blocks or default_blocks(tokens)
    tiles, runs = stacked_tiles(users, tokens, blocks.tile), stacked_runs(users, tokens)
    h_RxM = h_NxRxT.transpose(1, 0, 2).reshape(h_NxRxT.shape[1], -1)
    rows = (_flat(g_NxTxF), _flat(x_NxTxD), h_RxM, a_NxRxD, b_NxRxF, scale_N)
    dx_MxD, da_NxRxD, db_NxRxF, gb_RxM = triton_lora.backward(
        *rows, tiles, runs, None, blocks, name=NAME, interpret=interpret
    )
    products_RxM = gb_RxM.astype(jnp.float32) * h_RxM.astype(jnp.float32)
    ds_N = jnp.sum(products_RxM.reshape(-1, users, tokens), axis=(0, 2)).astype(scale_N.dtype)
    return dx_MxD.reshape(x_NxTxD.shape), da_NxRxD, db_NxRxF, ds_N


def default_blocks(tokens: int) -> Blocks:
    """Until a device has been tuned: whole tensor-core tiles, and single rows where users have single tokens."""
    if tokens == 1:
        return Blocks(tile=1, block=512, warps=4, stages=1)
    return Blocks(tile=64 if tokens >= 64 else 16, block=64, warps=4, stages=3, joint=256)


def _flat(x_NxTxD: jax.Array) -> jax.Array:
    return x_NxTxD.reshape(-1, x_NxTxD.shape[-1])
