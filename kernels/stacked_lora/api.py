"""The op as the rest of popax calls it: one user's low-rank delta."""

import jax

from popax.kernels.stacked_lora.vjp import lora as _lora_TxD


def lora(x: jax.Array, a_RxD: jax.Array, b_RxF: jax.Array, scale: jax.Array) -> jax.Array:
    """delta = s (x A^T) B for one user.

    x: [..., D]; a: [R, D]; b: [R, F]; scale: scalar array. Returns [..., F] in x's dtype; the factors may be of
    another float dtype. Under `jax.vmap` over users it becomes one stacked op, forward and backward. LoRA,
    arXiv 2106.09685, eq. 3.
    """
    leading = x.shape[:-1]
    delta_TxF = _lora_TxD(x.reshape(-1, x.shape[-1]), a_RxD, b_RxF, scale)
    return delta_TxF.reshape(*leading, b_RxF.shape[-1])
