"""The op as the rest of popax calls it: the base product with the update of one user, or of rows with slots."""

import jax

from popax.kernels.fused_lora import vjp
from popax.kernels.indexed_lora import indexed_lora


def fused_lora(
    x: jax.Array,
    w_DxF: jax.Array,
    a_RxD: jax.Array,
    b_RxF: jax.Array,
    scale: jax.Array,
    w_scale_F: jax.Array | None = None,
) -> jax.Array:
    """(x W) * w_scale + s (x A^T) B for one user, in x's dtype.

    x: [..., D]; w: [D, F] in a float dtype, or int8 or float8_e4m3fn as `quantize.quantize` makes them; a: [R, D];
    b: [R, F]; scale: scalar array; w_scale: float32 [F], needed with a quantised w. Under `jax.vmap` over users, w
    unbatched, it becomes one stacked op, forward and backward. Raises TypeError where somebody asks for the derivative
    by w or w_scale, which are frozen, and ValueError for a quantised w without its scale.
    """
    if w_scale_F is None and w_DxF.dtype.itemsize == 1:
        raise ValueError(
            f"w is {w_DxF.dtype}: pass w_scale_F, the float32 scale of each of its {w_DxF.shape[1]} columns"
        )
    x_TxD = x.reshape(-1, x.shape[-1])
    return vjp.fused_lora(x_TxD, w_DxF, a_RxD, b_RxF, scale, w_scale_F).reshape(*x.shape[:-1], w_DxF.shape[1])


def fused_lora_indexed(
    x_GxTxD: jax.Array,
    w_DxF: jax.Array,
    a_SxRxD: jax.Array,
    b_SxRxF: jax.Array,
    scale: jax.Array,
    slot_G: jax.Array,
    w_scale_F: jax.Array | None = None,
) -> jax.Array:
    """(x_g W) * w_scale + s (x_g A[slot_g]^T) B[slot_g]; slot -1 gives the base product's very bytes.

    Shapes as in `indexed_lora.indexed_lora`, W and errors as in `fused_lora`. Two passes, not one kernel: XLA's
    product streams W once, and the indexed op adds to its result in place. For 256 tokens in 256 slots at 4,096 ->
    4,096 and rank 16 that one more trip of y is 4 MB beside 100 MB of W and adapters.
    """
    _check_scale(w_DxF, w_scale_F)
    y_GxTxF = vjp.base(x_GxTxD, w_DxF, w_scale_F)
    return indexed_lora(x_GxTxD, a_SxRxD, b_SxRxF, scale, slot_G, y_GxTxF)


def _check_scale(w_DxF: jax.Array, w_scale_F: jax.Array | None) -> None:
    if w_scale_F is None and w_DxF.dtype.itemsize == 1:
        raise ValueError(
            f"w is {w_DxF.dtype}: pass w_scale_F, the float32 scale of each of its {w_DxF.shape[1]} columns"
        )
