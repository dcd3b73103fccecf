"""LoRA at routed experts: the factor on the hidden side is one for all experts of a user, the other one for each.

gate and up: a [R, D] is shared, b [E, R, F] is each expert's; down: a [E, R, F] is each expert's, b [R, D] is shared.
A user then has R (D + E F) numbers a site in place of R E (D + F), and a token goes through the shared factor once,
not once for each of its experts.
"""

import jax
import jax.numpy as jnp

from popax.adapters.method import ExpertMethod, Leaves


def _own(state: Leaves) -> jax.Array:
    return state["a"] if state["a"].ndim > state["b"].ndim else state["b"]


def _before(state: Leaves, scale: jax.Array, x_BxTxD: jax.Array, slot_B: jax.Array | None) -> jax.Array:
    return _product(x_BxTxD, "btd", state["a"], "rd", "btr", scale, slot_B).astype(x_BxTxD.dtype)


def _after(
    state: Leaves, scale: jax.Array, low_BxTxR: jax.Array, y_BxTxD: jax.Array, slot_B: jax.Array | None
) -> jax.Array:
    delta_BxTxD = _product(low_BxTxR, "btr", state["b"], "rd", "btd", scale, slot_B).astype(y_BxTxD.dtype)
    if slot_B is None:
        return y_BxTxD + delta_BxTxD
    return jnp.where((slot_B >= 0)[:, None, None], y_BxTxD + delta_BxTxD, y_BxTxD)


def _product(x, x_axes: str, factor, factor_axes: str, out_axes: str, scale, slot_B) -> jax.Array:
    """scale * x factor in float32, with the row's own factor where there are slots."""
    if slot_B is not None:
        factor, factor_axes = factor[jnp.maximum(slot_B, 0)], "b" + factor_axes
    subscripts = f"{x_axes},{factor_axes}->{out_axes}"
    return scale * jnp.einsum(subscripts, x, factor.astype(x.dtype), preferred_element_type=jnp.float32)


EXPERTS = ExpertMethod(own=_own, before=_before, after=_after)
