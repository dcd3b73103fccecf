"""The op as the rest of popax calls it: groups of tokens, each with the slot of its user."""

import jax
import jax.numpy as jnp

from popax.kernels import dispatch, target
from popax.kernels.indexed_lora import reference, vjp
from popax.kernels.indexed_lora.reference_decode import Site


def indexed_lora(
    x_GxTxD: jax.Array,
    a_SxRxD: jax.Array,
    b_SxRxF: jax.Array,
    scale: jax.Array,
    slot_G: jax.Array,
    y_GxTxF: jax.Array | None = None,
) -> jax.Array:
    """y_g + s (x_g A[slot_g]^T) B[slot_g]; slot -1 gives y's very bytes, or exact zeros without y.

    x: [G, T, D], a group of T tokens shares a slot (T = 1: a slot per token); a: [S, R, D]; b: [S, R, F]; scale: scalar
    array; slot: int [G] in [-1, S). Returns [G, T, F] in y's dtype, or x's. Differentiable in x, a, b, scale and y.
    """
    return indexed_lora_sites(x_GxTxD, ((a_SxRxD, b_SxRxF, y_GxTxF),), (scale,), slot_G)[0]


def indexed_lora_sites(
    x_GxTxD: jax.Array, sites: tuple[Site, ...], scales: tuple[jax.Array, ...], slot_G: jax.Array
) -> tuple[jax.Array, ...]:
    """`indexed_lora` at several sites (a, b, y) that share x, as q, k and v do.

    With a token a group, the sites of equal rank are one launch.
    """
    if target.platform() not in dispatch.BACKENDS:
        return tuple(_in_xla(x_GxTxD, *site, scale, slot_G) for site, scale in zip(sites, scales, strict=True))
    groups, tokens, d_in = x_GxTxD.shape
    x_MxD, slot_M = x_GxTxD.reshape(-1, d_in), jnp.repeat(slot_G.astype(jnp.int32), tokens)
    flat = [(a_SxRxD, b_SxRxF, _flat(x_GxTxD, b_SxRxF, y)) for a_SxRxD, b_SxRxF, y in sites]
    wide = [jnp.broadcast_to(scale, a_SxRxD.shape[:1]) for (a_SxRxD, *_), scale in zip(sites, scales, strict=True)]
    outputs: dict[int, jax.Array] = {}
    for together in _launches(sites) if tokens == 1 else [[at] for at in range(len(sites))]:
        rank_S = vjp.full_rank(flat[together[0]][0])
        if tokens == 1:
            chosen = tuple(flat[at] for at in together), tuple(wide[at] for at in together)
            outputs |= zip(together, vjp.decode(x_MxD, *chosen, slot_M, rank_S), strict=True)
        else:
            (at,) = together
            a_SxRxD, b_SxRxF, y_MxF = flat[at]
            outputs[at] = vjp.grouped(groups, x_MxD, a_SxRxD, b_SxRxF, wide[at], slot_M, rank_S, y_MxF)
    return tuple(outputs[at].reshape(groups, tokens, -1) for at in range(len(sites)))


def _launches(sites: tuple[Site, ...]) -> list[list[int]]:
    """The sites of each launch: those whose factors have the same slots and rank."""
    shapes = [a_SxRxD.shape for a_SxRxD, *_ in sites]
    return [[at for at, shape in enumerate(shapes) if shape == each] for each in dict.fromkeys(shapes)]


def _flat(x_GxTxD: jax.Array, b_SxRxF: jax.Array, y_GxTxF: jax.Array | None) -> jax.Array:
    if y_GxTxF is not None:
        return y_GxTxF.reshape(-1, y_GxTxF.shape[-1])
    return jnp.zeros((x_GxTxD.shape[0] * x_GxTxD.shape[1], b_SxRxF.shape[2]), x_GxTxD.dtype)


def _in_xla(x_GxTxD, a_SxRxD, b_SxRxF, y_GxTxF, scale, slot_G) -> jax.Array:
    delta_GxTxF = reference.indexed_lora(x_GxTxD, a_SxRxD, b_SxRxF, scale, slot_G)
    if y_GxTxF is None:
        return delta_GxTxF
    return jnp.where((slot_G >= 0)[:, None, None], y_GxTxF + delta_GxTxF.astype(y_GxTxF.dtype), y_GxTxF)
