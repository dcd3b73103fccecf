"""The fused op on TPU: while blocks of x stream through the product with W, the same blocks make h = x A^T.

A launch walks (group of row tiles, column block of W, row tile, block of the sum). In the first pass over columns h
gathers in VMEM, where it stays, transposed, for the other passes; the last step of a sum adds s h B and writes the
result once. Int8 and float8 weights become x's dtype inside a step. The backward's dx = g W^T + s (g B^T) A is the
same launch with W read transposed and the factors exchanged.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from popax.kernels.fused_lora import reference, tiling
from popax.kernels.fused_lora.tiling import Blocks, Shape
from popax.kernels.tpu import cdiv, compiler_params, dot, two_rows

ACTIVATIONS = (jnp.bfloat16, jnp.float32)
WEIGHTS = (*ACTIVATIONS, jnp.int8, jnp.float8_e4m3fn)


def forward(
    x_NxTxD: jax.Array,
    w_DxF: jax.Array,
    a_NxRxD: jax.Array,
    b_NxRxF: jax.Array,
    scale_N: jax.Array,
    w_scale_F: jax.Array | None = None,
    *,
    blocks: Blocks | None = None,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """((x W) * w_scale + s (x A^T) B, h_NxRxT = A x^T), as `reference.forward`.

    Raises NotImplementedError for a dtype that it does not take, or where blocks do not fit VMEM.
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
    interpret=False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(dx, dA, dB, ds), as `reference.backward`: dx and B g^T in one launch, the factors' gradients from those in XLA.

    blocks: d_in counts g's columns, d_out those of dx. Raises as `forward`.
    """
    g_NxTxF = g_NxTxF.astype(x_NxTxD.dtype)
    operands = (g_NxTxF, w_DxF, b_NxRxF, a_NxRxD, scale_N, w_scale_F)
    options = {"blocks": blocks, "name": "popax_fused_lora_input_gradient", "interpret": interpret}
    dx_NxTxD, gb_NxRxT = _launch(*operands, transposed=True, **options)
    da_NxRxD, db_NxRxF, ds_N = reference.factor_gradients(g_NxTxF, x_NxTxD, h_NxRxT, gb_NxRxT, scale_N)
    return dx_NxTxD, da_NxRxD.astype(a_NxRxD.dtype), db_NxRxF.astype(b_NxRxF.dtype), ds_N.astype(scale_N.dtype)


class _Plan(NamedTuple):
    """What the kernel knows when it is traced. steps: blocks of a sum; tiles: row tiles of a user."""

    blocks: Blocks
    steps: int
    tiles: int
    columns: int
    reduced: int
    transposed: bool
    has_w_scale: bool


def product_shape(x_NxTxD, w_DxF, factor_NxRxD, *, transposed: bool, has_w_scale: bool) -> Shape:
    """The shape that decides the blocks: of the forward, or (transposed) of the backward's dx, where x is g."""
    (users, tokens, d_in), d_out = x_NxTxD.shape, w_DxF.shape[0 if transposed else 1]
    rank = max(factor_NxRxD.shape[1], 2)
    converted = w_DxF.dtype != x_NxTxD.dtype or (transposed and has_w_scale)
    return Shape(users, tokens, d_in, d_out, rank, x_NxTxD.dtype.itemsize, w_DxF.dtype.itemsize, converted)


def _launch(
    x_NxTxD, w, a_NxRxD, b_NxRxF, scale_N, w_scale, *, transposed: bool, blocks: Blocks | None, name: str, interpret
) -> tuple[jax.Array, jax.Array]:
    """(x W + s (x A^T) B, A x^T). transposed: W is [F, D] in memory, and w_scale is on D, not on F."""
    _check_dtypes(x_NxTxD, w, a_NxRxD, b_NxRxF)
    if a_NxRxD.shape[1] == 1:
        two = (two_rows(a_NxRxD, (1,)), two_rows(b_NxRxF, (1,)))
        options = {"transposed": transposed, "blocks": blocks, "name": name, "interpret": interpret}
        out_NxTxF, h_NxRxT = _launch(x_NxTxD, w, *two, scale_N, w_scale, **options)
        return out_NxTxF, h_NxRxT[:, :1]
    shape = product_shape(x_NxTxD, w, a_NxRxD, transposed=transposed, has_w_scale=w_scale is not None)
    blocks = blocks or tiling.default_blocks(shape)
    users, tile, d_in, d_out, group = blocks
    plan = _Plan(
        blocks,
        cdiv(shape.d_in, d_in),
        cdiv(shape.tokens, tile),
        tiling.column_chunk(d_out),
        tiling.reduced_chunk(shape, d_in),
        transposed,
        w_scale is not None,
    )

    def at(spec_shape, index, **options):
        """index(block of users, token tile, column block, block of the sum)."""
        return pl.BlockSpec(spec_shape, lambda p, f, m, k: index(*divmod(p * group + m, plan.tiles), f, k), **options)

    def in_first_pass(spec_shape, index):
        """A block that only the first pass over columns uses: in the others its index stands still."""

        def place(p, f, m, k):
            later = f > 0
            row = p * group + jnp.where(later, group - 1, m)
            return index(row // plan.tiles, row % plan.tiles, jnp.where(later, plan.steps - 1, k))

        return pl.BlockSpec(spec_shape, place)

    once = {"pipeline_mode": pl.Buffered(1)} if tiling.w_stays(shape, blocks) else {}
    w_block = (d_out, d_in) if transposed else (d_in, d_out)
    in_specs = [
        pl.BlockSpec(memory_space=pltpu.SMEM),
        at((users, tile, d_in), lambda n, t, f, k: (n, t, k)),
        at(w_block, lambda n, t, f, k: (f, k) if transposed else (k, f), **once),
        in_first_pass((users, a_NxRxD.shape[1], d_in), lambda n, t, k: (n, 0, k)),
        at((users, b_NxRxF.shape[1], d_out), lambda n, t, f, k: (n, 0, f)),
    ]
    operands = [scale_N.astype(jnp.float32), x_NxTxD, w, a_NxRxD, b_NxRxF]
    if w_scale is not None:
        in_specs.append(
            at((1, d_in if transposed else d_out), lambda n, t, f, k: (0, k) if transposed else (0, f)),
        )
        operands.append(w_scale.astype(jnp.float32).reshape(1, -1))
    scratch = [pltpu.VMEM((group * users, shape.rank, tile), jnp.float32)]
    if plan.steps > 1:
        scratch += [
            pltpu.VMEM((users, tile, shape.rank), jnp.float32),
            pltpu.VMEM((users * tile, d_out), jnp.float32),
        ]
    rows = shape.population * shape.tokens
    products = rows * (shape.d_in * shape.d_out + shape.rank * (shape.d_in + shape.d_out))
    return tuple(
        pl.pallas_call(
            functools.partial(_kernel, plan=plan),
            grid=(tiling.row_tiles(shape, blocks) // group, cdiv(shape.d_out, d_out), group, plan.steps),
            in_specs=in_specs,
            out_specs=[
                at((users, tile, d_out), lambda n, t, f, k: (n, t, f)),
                in_first_pass((users, shape.rank, tile), lambda n, t, k: (n, 0, t)),
            ],
            out_shape=[
                jax.ShapeDtypeStruct((shape.population, shape.tokens, shape.d_out), x_NxTxD.dtype),
                jax.ShapeDtypeStruct((shape.population, shape.rank, shape.tokens), x_NxTxD.dtype),
            ],
            scratch_shapes=scratch,
            compiler_params=compiler_params(("parallel", "arbitrary", "arbitrary", "arbitrary")),
            cost_estimate=pl.CostEstimate(
                flops=2 * products, bytes_accessed=tiling.moved_bytes(shape, blocks), transcendentals=0
            ),
            name=name,
            interpret=interpret,
        )(*operands)
    )


def _kernel(scale, x, w, a, b, *rest, plan: _Plan):
    w_scale, rest = (rest[0], rest[1:]) if plan.has_w_scale else (None, rest)
    out, h, hidden, *sums = rest
    users, tile = plan.blocks.users, plan.blocks.tile
    column, row, step = pl.program_id(1), pl.program_id(2), pl.program_id(3)
    first_user = (pl.program_id(0) * plan.blocks.group + row) // plan.tiles * users
    last = step == plan.steps - 1

    @pl.when(column == 0)
    def _():
        for user in range(users):
            part_txr = dot(x[user], a[user].astype(x.dtype), ((1,), (1,)))
            if plan.steps == 1:
                _keep(hidden, h, row * users + user, user, part_txr)
                continue
            h_acc = sums[0]
            _gather(h_acc.at[user], step, part_txr)

            @pl.when(last)
            def _(h_acc=h_acc, user=user):
                _keep(hidden, h, row * users + user, user, h_acc[user])

    def columns(index, carry):
        width = plan.columns
        at_f = pl.ds(index * width if isinstance(index, int) else pl.multiple_of(index * width, width), width)
        part_mxf = _base(x, w, w_scale, at_f, plan)
        if plan.steps == 1:
            finish(part_mxf, at_f)
            return carry
        acc = sums[1].at[:, at_f]
        _gather(acc, step, part_mxf)

        @pl.when(last)
        def _():
            finish(acc[...], at_f)

        return carry

    def finish(base_mxf, at_f):
        if w_scale is not None and not plan.transposed:
            base_mxf = base_mxf * w_scale[:, at_f]
        for user in range(users):
            scaled_rxt = (hidden[row * users + user] * scale[first_user + user]).astype(x.dtype)
            delta_txf = dot(scaled_rxt, b[user, :, at_f].astype(x.dtype), ((0,), (0,)))
            out[user, :, at_f] = (base_mxf[user * tile : (user + 1) * tile] + delta_txf).astype(out.dtype)

    chunks = plan.blocks.d_out // plan.columns
    if chunks == 1:
        columns(0, 0)
    else:
        jax.lax.fori_loop(0, chunks, columns, 0)


def _base(x, w, w_scale, at_f, plan: _Plan) -> jax.Array:
    """This step's part of x W at some columns, float32 [rows, columns]; W and g's scale are taken on in passing."""
    parts = []
    for begin in range(0, plan.blocks.d_in, plan.reduced):
        at_d = slice(begin, begin + plan.reduced)
        x_mxd = x[:, :, at_d].reshape(-1, plan.reduced)
        if plan.transposed and w_scale is not None:
            x_mxd = (x_mxd.astype(jnp.float32) * w_scale[:, at_d]).astype(x.dtype)
        if plan.transposed:
            parts.append(dot(x_mxd, w[at_f, at_d].astype(x.dtype), ((1,), (1,))))
        else:
            parts.append(dot(x_mxd, w[at_d, at_f].astype(x.dtype), ((1,), (0,))))
    return functools.reduce(jnp.add, parts)


def _gather(acc, step, part) -> None:
    @pl.when(step == 0)
    def _():
        acc[...] = part

    @pl.when(step > 0)
    def _():
        acc[...] += part


def _keep(hidden, h, place, user: int, h_txr) -> None:
    h_rxt = h_txr.T
    hidden[place] = h_rxt
    h[user] = h_rxt.astype(h.dtype)


def _check_dtypes(x, w, a, b) -> None:
    for name, array, taken in (("x", x, ACTIVATIONS), ("A", a, ACTIVATIONS), ("B", b, ACTIVATIONS), ("W", w, WEIGHTS)):
        if array.dtype not in taken:
            names = ", ".join(jnp.dtype(each).name for each in taken)
            raise NotImplementedError(f"{name} is {array.dtype}; the TPU form takes {names}")
