"""The op as the rest of popax calls it: one user's low-rank update."""

import jax

from popax.kernels.stacked_lora import vjp


def lora(x: jax.Array, a_RxD: jax.Array, b_RxF: jax.Array, scale: jax.Array, y: jax.Array | None = None) -> jax.Array:
    """y + s (x A^T) B for one user; without y the update alone.

    x: [..., D]; a: [R, D]; b: [R, F]; scale: scalar array; y: [..., F]. Returns [..., F] in y's dtype, or in x's
    without y; the factors may be of another float dtype. Under `jax.vmap` over users it becomes one stacked op,
    forward and backward. LoRA, arXiv 2106.09685, eq. 3.
    """
    leading, d_out = x.shape[:-1], b_RxF.shape[-1]
    x_TxD = x.reshape(-1, x.shape[-1])
    if y is None:
        return vjp.delta(x_TxD, a_RxD, b_RxF, scale).reshape(*leading, d_out)
    return vjp.lora(x_TxD, a_RxD, b_RxF, scale, y.reshape(-1, d_out)).reshape(*leading, d_out)
