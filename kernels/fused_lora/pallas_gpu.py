"""The fused op on GPU in Pallas-Triton: a tiled product whose programs make their rows' h from the same blocks of x.

A program has a tile of one user's rows and a block of columns; h is made anew for every block of columns, which costs
R / d_out of the product and saves a pass over x. Int8 and float8 weights become x's dtype after they are loaded. The
backward's dx = g W^T + s (g B^T) A is the same kernel with W read transposed and the factors exchanged.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from popax.kernels.fused_lora import reference

ACTIVATIONS = (jnp.float32, jnp.bfloat16, jnp.float16)
WEIGHTS = (*ACTIVATIONS, jnp.int8, jnp.float8_e4m3fn)
MIN_DOT = 16  # the least extent of a tensor core's operand


class Blocks(NamedTuple):
    """tile: rows; d_out, d_in: columns made and columns summed over a step; powers of two >= 16.

    group: row tiles that walk W's columns together, so that a block of W is still in the cache for each.
    """

    tile: int = 128
    d_out: int = 128
    d_in: int = 32
    group: int = 8
    warps: int = 8
    stages: int = 3


def forward(
    x_NxTxD: jax.Array,
    w_DxF: jax.Array,
    a_NxRxD: jax.Array,
    b_NxRxF: jax.Array,
    scale_N: jax.Array,
    w_scale_F: jax.Array | None = None,
    *,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """((x W) * w_scale + s (x A^T) B, h_NxRxT), as `reference.forward`.

    Raises NotImplementedError for a dtype that it does not take, float64 among them.
    """
    operands = (x_NxTxD, w_DxF, a_NxRxD, b_NxRxF, scale_N, w_scale_F)
    return _launch(*operands, transposed=False, blocks=blocks, name="popax_fused_lora_forward", interpret=interpret)


def backward(
    g_NxTxF: jax.Array,
    x_NxTxD: jax.Array,
    h_NxRxT: jax.Array,
    w_DxF: jax.Array,
    a_NxRxD: jax.Array,
    b_NxRxF: jax.Array,
    scale_N: jax.Array,
    w_scale_F: jax.Array | None = None,
    *,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(dx, dA, dB, ds), as `reference.backward`; the factors' gradients are XLA's. Raises as `forward`."""
    g_NxTxF = g_NxTxF.astype(x_NxTxD.dtype)
    operands = (g_NxTxF, w_DxF, b_NxRxF, a_NxRxD, scale_N, w_scale_F)
    options = {"blocks": blocks, "name": "popax_fused_lora_input_gradient", "interpret": interpret}
    dx_NxTxD, gb_NxRxT = _launch(*operands, transposed=True, **options)
    da_NxRxD, db_NxRxF, ds_N = reference.factor_gradients(g_NxTxF, x_NxTxD, h_NxRxT, gb_NxRxT, scale_N)
    return dx_NxTxD, da_NxRxD.astype(a_NxRxD.dtype), db_NxRxF.astype(b_NxRxF.dtype), ds_N.astype(scale_N.dtype)


class _Plan(NamedTuple):
    blocks: Blocks
    users: int
    tokens: int
    rank: int
    d_in: int
    d_out: int
    transposed: bool
    has_w_scale: bool


def _launch(
    x_NxTxD, w, a_NxRxD, b_NxRxF, scale_N, w_scale, *, transposed: bool, blocks: Blocks | None, name: str, interpret
) -> tuple[jax.Array, jax.Array]:
    """(x W + s (x A^T) B, A x^T). transposed: W is [F, D] in memory, and w_scale is on D, not on F."""
    _check_dtypes(x_NxTxD, w, a_NxRxD, b_NxRxF)
    (users, tokens, d_in), (_, rank, d_out) = x_NxTxD.shape, b_NxRxF.shape
    blocks = blocks or default_blocks(tokens, x_NxTxD.dtype.itemsize)
    plan = _Plan(blocks, users, tokens, rank, d_in, d_out, transposed, w_scale is not None)
    operands = [scale_N.astype(jnp.float32), x_NxTxD, w, a_NxRxD, b_NxRxF]
    if w_scale is not None:
        operands.append(w_scale.astype(jnp.float32))
    passes, rows = pl.cdiv(d_out, blocks.d_out), users * tokens
    products = rows * (d_in * d_out + rank * (d_in * passes + d_out))
    written = rows * (d_out + rank) * x_NxTxD.dtype.itemsize
    moved = sum(operand.size * operand.dtype.itemsize for operand in operands) + written
    return tuple(
        pl.pallas_call(
            functools.partial(_kernel, plan=plan),
            grid=(users * pl.cdiv(tokens, blocks.tile) * passes,),
            out_shape=[
                jax.ShapeDtypeStruct((users, tokens, d_out), x_NxTxD.dtype),
                jax.ShapeDtypeStruct((users, rank, tokens), x_NxTxD.dtype),
            ],
            compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
            cost_estimate=pl.CostEstimate(flops=2 * products, bytes_accessed=moved, transcendentals=0),
            name=name,
            interpret=interpret,
        )(*operands)
    )


def _place(plan: _Plan):
    """(user, first token, column block) of this program: the row tiles of a group, then the next columns."""
    user_tiles, passes = pl.cdiv(plan.tokens, plan.blocks.tile), pl.cdiv(plan.d_out, plan.blocks.d_out)
    tiles, program = plan.users * user_tiles, pl.program_id(0)
    first = program // (plan.blocks.group * passes) * plan.blocks.group
    in_group = jnp.minimum(plan.blocks.group, tiles - first)
    inside = program - first * passes
    tile = first + inside % in_group
    return tile // user_tiles, tile % user_tiles * plan.blocks.tile, inside // in_group


def _kernel(scale, x, w, a, b, *rest, plan: _Plan):
    w_scale, (out, h) = (rest[0], rest[1:]) if plan.has_w_scale else (None, rest)
    blocks, width = plan.blocks, max(MIN_DOT, pl.next_power_of_2(plan.rank))
    user, first_token, column_block = _place(plan)
    token_t = first_token + jnp.arange(blocks.tile, dtype=jnp.int32)
    column_f = column_block * blocks.d_out + jnp.arange(blocks.d_out, dtype=jnp.int32)
    rank_r = jnp.arange(width, dtype=jnp.int32)
    mine_t, inside_f, live_r = token_t < plan.tokens, column_f < plan.d_out, rank_r < plan.rank

    def step(index, sums):
        acc_txf, h_txr = sums
        column_d = index * blocks.d_in + jnp.arange(blocks.d_in, dtype=jnp.int32)
        inside_d = column_d < plan.d_in
        x_txd = _load(x.at[user, token_t[:, None], column_d[None, :]], mine_t[:, None] & inside_d[None, :])
        a_dxr = _load(a.at[user, rank_r[None, :], column_d[:, None]], inside_d[:, None] & live_r[None, :])
        mask_dxf = inside_d[:, None] & inside_f[None, :]
        if plan.transposed:
            w_dxf = _load(w.at[column_f[None, :], column_d[:, None]], mask_dxf)
        else:
            w_dxf = _load(w.at[column_d[:, None], column_f[None, :]], mask_dxf)
        left_txd = x_txd
        if plan.transposed and w_scale is not None:
            scale_d = _load(w_scale.at[column_d], inside_d)
            left_txd = (x_txd.astype(jnp.float32) * scale_d[None, :]).astype(x_txd.dtype)
        acc_txf = acc_txf + _dot(left_txd, w_dxf.astype(x_txd.dtype))
        return acc_txf, h_txr + _dot(x_txd, a_dxr.astype(x_txd.dtype))

    zeros = jnp.zeros((blocks.tile, blocks.d_out), jnp.float32), jnp.zeros((blocks.tile, width), jnp.float32)
    acc_txf, h_txr = jax.lax.fori_loop(0, pl.cdiv(plan.d_in, blocks.d_in), step, zeros)
    if w_scale is not None and not plan.transposed:
        acc_txf = acc_txf * _load(w_scale.at[column_f], inside_f)[None, :]
    b_rxf = _load(b.at[user, rank_r[:, None], column_f[None, :]], live_r[:, None] & inside_f[None, :])
    scaled_txr = (h_txr * scale[user]).astype(x.dtype)
    result_txf = acc_txf + _dot(scaled_txr, b_rxf.astype(x.dtype))
    plgpu.store(
        out.at[user, token_t[:, None], column_f[None, :]],
        result_txf.astype(out.dtype),
        mask=mine_t[:, None] & inside_f[None, :],
    )
    # Every block of columns has the same h: the first one's is kept.
    kept_txr = mine_t[:, None] & live_r[None, :] & (column_block == 0)
    plgpu.store(h.at[user, rank_r[None, :], token_t[:, None]], h_txr.astype(h.dtype), mask=kept_txr)


def _load(ref, mask: jax.Array) -> jax.Array:
    return plgpu.load(ref, mask=mask, other=0 if jnp.issubdtype(ref.dtype, jnp.integer) else 0.0)


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
    if left.dtype == jnp.float32:
        return plgpu.dot(left, right, precision=jax.lax.Precision.HIGHEST)
    return plgpu.dot(left, right)


def default_blocks(tokens: int, itemsize: int) -> Blocks:
    """Until a device has been tuned: tiles of the tokens that a user has, narrower for float32."""
    tile = min(128, max(MIN_DOT, pl.next_power_of_2(tokens)))
    return Blocks(tile=tile) if itemsize == 2 else Blocks(tile=min(tile, 64), d_out=64)


def _check_dtypes(x, w, a, b) -> None:
    for name, array, taken in (("x", x, ACTIVATIONS), ("A", a, ACTIVATIONS), ("B", b, ACTIVATIONS), ("W", w, WEIGHTS)):
        if array.dtype not in taken:
            names = ", ".join(jnp.dtype(each).name for each in taken)
            raise NotImplementedError(f"{name} is {array.dtype}; the GPU form takes {names}")
