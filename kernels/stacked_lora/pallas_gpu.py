"""The stacked op on GPU: grouped shrink, expand and outer products in Pallas-Triton over users of equal length."""

import jax
import jax.numpy as jnp

from popax.kernels.triton import Blocks, expand, outer, shrink, stacked_tiles


def forward(
    x_NxTxD: jax.Array,
    a_NxRxD: jax.Array,
    b_NxRxF: jax.Array,
    scale_N: jax.Array,
    y_NxTxF: jax.Array | None = None,
    *,
    blocks: Blocks | None = None,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """(y + delta, h_NxRxT), as `reference.forward`. Raises NotImplementedError for float64."""
    blocks = blocks or default_blocks(x_NxTxD.shape[1])
    _check(x_NxTxD)
    users, tokens, _ = x_NxTxD.shape
    tiles = stacked_tiles(users, tokens, blocks.tile)
    h_RxM = shrink(_flat(x_NxTxD), a_NxRxD, tiles, None, blocks, name="popax_stacked_lora_shrink", interpret=interpret)
    y_MxF = None if y_NxTxF is None else _flat(y_NxTxF)
    out_MxF = expand(
        h_RxM, b_NxRxF, scale_N, tiles, None, y_MxF, blocks, name="popax_stacked_lora_expand", interpret=interpret
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
    interpret=False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(dx, dA, dB, ds), as `reference.backward`. Raises NotImplementedError for float64."""
    blocks = blocks or default_blocks(x_NxTxD.shape[1])
    _check(x_NxTxD)
    users, tokens, _ = x_NxTxD.shape
    tiles = stacked_tiles(users, tokens, blocks.tile)
    g_MxF, x_MxD = _flat(g_NxTxF).astype(x_NxTxD.dtype), _flat(x_NxTxD)
    h_RxM = h_NxRxT.transpose(1, 0, 2).reshape(h_NxRxT.shape[1], -1)
    gb_RxM = shrink(g_MxF, b_NxRxF, tiles, None, blocks, name="popax_stacked_lora_shrink", interpret=interpret)
    dx_MxD = expand(
        gb_RxM, a_NxRxD, scale_N, tiles, None, None, blocks, name="popax_stacked_lora_expand", interpret=interpret
    )
    first_N = jnp.arange(users, dtype=jnp.int32) * tokens
    rows = (first_N, first_N + tokens, tiles.row_M, scale_N, blocks)
    options = {"name": "popax_stacked_lora_outer", "interpret": interpret}
    da_NxRxD = outer(gb_RxM, x_MxD, *rows, dtype=a_NxRxD.dtype, **options)
    db_NxRxF = outer(h_RxM, g_MxF, *rows, dtype=b_NxRxF.dtype, **options)
    products_RxM = gb_RxM.astype(jnp.float32) * h_RxM.astype(jnp.float32)
    ds_N = jnp.sum(products_RxM.reshape(-1, users, tokens), axis=(0, 2)).astype(scale_N.dtype)
    return dx_MxD.reshape(x_NxTxD.shape), da_NxRxD, db_NxRxF, ds_N


def default_blocks(tokens: int) -> Blocks:
    """Until a device has been tuned: whole tensor-core tiles, and single rows where users have single tokens."""
    if tokens == 1:
        return Blocks(tile=1, block=256, warps=4, stages=4)
    return Blocks(tile=64 if tokens >= 64 else 16, block=64, warps=4, stages=3)


def _flat(x_NxTxD: jax.Array) -> jax.Array:
    return x_NxTxD.reshape(-1, x_NxTxD.shape[-1])


def _check(x: jax.Array) -> None:
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"x is {x.dtype}; the GPU form accumulates in float32: float32, bfloat16, float16")
