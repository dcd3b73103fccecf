"""What adapters' changes of the weights measure: norms, inner products, and the subspaces they act in.

All of it from factors (popax.adapters.changes), which raises ConfigError where a method has none.
"""

import jax
import jax.numpy as jnp

from popax.adapters.changes import Factored, layers_of
from popax.adapters.cohort import EXACT, Cohort
from popax.types import AdapterState


def core(change: Factored) -> jax.Array:
    """The R x R matrix with the singular values of A^T B: the triangular factors of QR(A^T) and QR(B^T), multiplied.

    It is at most as large as the smaller of D and F on either side.
    """
    left, right = (jnp.linalg.qr(x.mT, mode="r") for x in change)
    return jnp.matmul(left, right.mT, precision=EXACT)


def spectral_norms(cohort: Cohort, adapter: AdapterState, shared: AdapterState) -> dict[str, jax.Array]:
    """The largest singular value of each site's change, [L] (over experts too where there are some)."""

    def largest(change: Factored) -> jax.Array:
        return jnp.linalg.svd(core(change), compute_uv=False)[0]

    return {name: jax.vmap(largest)(change) for name, change in layers_of(cohort, adapter, shared).items()}


def subspace_overlap(one_RxD: jax.Array, other_RxD: jax.Array) -> jax.Array:
    """||Q1^T Q2||_F^2 / r, Q orthonormal bases of the rows' spans: 1 for equal spans, about r / D for random ones.

    r: the smaller rank. Rows must be linearly independent.
    """
    q_DxR, other_DxR = (jnp.linalg.qr(x.mT)[0] for x in (one_RxD, other_RxD))
    inner = jnp.matmul(q_DxR.mT, other_DxR, precision=EXACT)
    return jnp.sum(jnp.square(inner)) / min(one_RxD.shape[0], other_RxD.shape[0])


def gram(cohort: Cohort, adapters_N: AdapterState, shared: AdapterState) -> jax.Array:
    """<change of user i, change of user j> over all sites, float32 [N, N]; adapters with N first on every leaf.

    A site at a time, from the factors' products or from the changes themselves, whichever is less work. Take
    `interference` for cosines.
    """
    changes = jax.vmap(lambda adapter: layers_of(cohort, adapter, shared))(adapters_N)
    total_NxN = jnp.zeros(())
    for change in changes.values():
        layers = (jnp.moveaxis(change.a_RxD, 1, 0), jnp.moveaxis(change.b_RxF, 1, 0))
        total_NxN = total_NxN + jnp.sum(jax.lax.map(lambda pair: _layer_gram(*pair), layers), axis=0)
    return total_NxN


def _layer_gram(a_NxRxD: jax.Array, b_NxRxF: jax.Array) -> jax.Array:
    (users, rank, d_in), d_out = a_NxRxD.shape, b_NxRxF.shape[-1]
    if d_in * d_out <= rank * rank * (d_in + d_out):
        w_NxW = jnp.einsum("nrd,nrf->ndf", a_NxRxD, b_NxRxF, precision=EXACT).reshape(users, -1)
        return jnp.matmul(w_NxW, w_NxW.T, precision=EXACT)

    def row(own: tuple[jax.Array, jax.Array]) -> jax.Array:
        """tr(B1^T B2 A2 A1^T) for one user and everybody."""
        (a_RxD, b_RxF) = own
        aa_NxRxR = jnp.einsum("nqd,rd->nqr", a_NxRxD, a_RxD, precision=EXACT)
        return jnp.sum(aa_NxRxR * jnp.einsum("nqf,rf->nqr", b_NxRxF, b_RxF, precision=EXACT), axis=(1, 2))

    return jax.lax.map(row, (a_NxRxD, b_NxRxF), batch_size=16)


def interference(cohort: Cohort, adapters_N: AdapterState, shared: AdapterState) -> tuple[jax.Array, jax.Array]:
    """(cosines of all users' changes [N, N], their norms [N]); cosine 0 where one of two changes nothing.

    What a plain sum of adapters does to each of them grows about linearly with these cosines.
    """
    products_NxN = gram(cohort, adapters_N, shared)
    norm_N = jnp.sqrt(jnp.maximum(jnp.diagonal(products_NxN), 0.0))
    sizes_NxN = norm_N[:, None] * norm_N[None]
    return jnp.where(sizes_NxN > 0, products_NxN / jnp.where(sizes_NxN > 0, sizes_NxN, 1.0), 0.0), norm_N
