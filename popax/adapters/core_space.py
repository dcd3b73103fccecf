"""Core space: the small space in which all of several changes lie, whatever their ranks (arXiv 2509.17786).

With orthonormal rows P that span all A_i and Q that span all B_i, A_i^T B_i = P^T M_i Q exactly, M_i = P A_i^T B_i Q^T.
The cores have one small shape, so that merging them is one vmapped program, and a merged core is factors again.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from popax.adapters.changes import Factored
from popax.adapters.cohort import EXACT


class CoreSpace(NamedTuple):
    """Of one layer: bases p [J, D] and q [K, F] with orthonormal rows, J = min(sum R, D), K = min(sum R, F)."""

    p_JxD: jax.Array
    q_KxF: jax.Array


def core_space(changes: Sequence[Factored]) -> tuple[CoreSpace, jax.Array]:
    """(the space of these changes of one layer, their cores [N, J, K])."""
    p_JxD, q_KxF = (_basis([change[side] for change in changes]) for side in (0, 1))
    cores = [_product(_product(p_JxD, a.mT), _product(b, q_KxF.mT)) for a, b in changes]
    return CoreSpace(p_JxD, q_KxF), jnp.stack(cores)


def back(space: CoreSpace, core_JxK: jax.Array) -> Factored:
    """The change P^T M Q of a core, of the rank of the space's smaller side."""
    if space.p_JxD.shape[0] <= space.q_KxF.shape[0]:
        return Factored(space.p_JxD, _product(core_JxK, space.q_KxF))
    return Factored(_product(core_JxK.mT, space.p_JxD), space.q_KxF)


def _basis(factors: Sequence[jax.Array]) -> jax.Array:
    """Orthonormal rows whose span holds all rows of all factors: singular vectors, so that zero rows do no harm."""
    return jnp.linalg.svd(jnp.concatenate(factors, axis=0), full_matrices=False)[2]


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=EXACT)
