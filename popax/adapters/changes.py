"""Adapters as changes of weights in factors, whatever their method: what measures and compositions work on.

No matrix of a weight's size is ever formed here. A layer's change is A^T B, A [R, D] and B [R, F], its scale in B.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from popax.adapters.cohort import EXACT, Cohort, scales
from popax.types import AdapterState


class Factored(NamedTuple):
    """A change A^T B of one layer, or of several with L first."""

    a_RxD: jax.Array
    b_RxF: jax.Array


Changes = dict[str, Factored]  # site -> [L, R, D], [L, R, F]; L = 1 outside the layer stack


def layers_of(cohort: Cohort, adapter: AdapterState, shared: AdapterState) -> Changes:
    """One adapter's change of every site; experts count as layers more, [L * E, ...].

    Raises ConfigError where the method's change is no product of factors (`Cohort.factors`).
    """

    def at_site(name: str) -> Factored:
        a, b = cohort.factors(name, adapter, shared)
        spec = cohort.specs[name]
        scale = jnp.asarray(scales(spec)).reshape(-1)
        a, b = (each if spec.info.layers else each[None] for each in (a, b))
        b = b * scale.reshape(-1, *(1,) * (b.ndim - 1))
        lead = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        return Factored(*(jnp.broadcast_to(x, (*lead, *x.shape[-2:])).reshape(-1, *x.shape[-2:]) for x in (a, b)))

    return {name: at_site(name) for name in cohort.specs}


def as_leaves(change: Factored, layered: bool) -> dict[str, jax.Array]:
    """The leaves of a LoRA whose scale is 1, without L outside the layer stack."""
    return {"a": change.a_RxD, "b": change.b_RxF} if layered else {"a": change.a_RxD[0], "b": change.b_RxF[0]}


def total(changes: Sequence[Factored], weights: Sequence[float]) -> Factored:
    """sum_i w_i A_i^T B_i, exactly: the factors side by side, of rank sum_i R_i."""
    return Factored(
        jnp.concatenate([change.a_RxD for change in changes], axis=-2),
        jnp.concatenate([change.b_RxF * weight for change, weight in zip(changes, weights, strict=True)], axis=-2),
    )


class Truncated(NamedTuple):
    """The nearest change of a lower rank, and ||what was left out||_F / ||change||_F (0 for no change)."""

    change: Factored
    error: jax.Array


def truncated(change: Factored, rank: int) -> Truncated:
    """One layer's best approximation of this rank (Eckart and Young), from QR of both factors and an SVD of R x R.

    sqrt(S) stands on each factor. A rank above that of the factors adds zeros.
    """
    (qa_DxR, ra_RxR), (qb_FxR, rb_RxR) = (jnp.linalg.qr(x.mT) for x in change)
    u_RxK, s_K, vt_KxR = jnp.linalg.svd(jnp.matmul(ra_RxR, rb_RxR.mT, precision=EXACT), full_matrices=False)
    kept = min(rank, s_K.shape[0])
    root_Kx1 = jnp.sqrt(s_K[:kept])[:, None]
    a = root_Kx1 * jnp.matmul(qa_DxR, u_RxK[:, :kept], precision=EXACT).T
    b = root_Kx1 * jnp.matmul(vt_KxR[:kept], qb_FxR.T, precision=EXACT)
    whole, left = jnp.sum(jnp.square(s_K)), jnp.sum(jnp.square(s_K[kept:]))
    error = jnp.sqrt(left / jnp.where(whole > 0, whole, 1.0))
    return Truncated(Factored(*(jnp.pad(x, ((0, rank - kept), (0, 0))) for x in (a, b))), error)
