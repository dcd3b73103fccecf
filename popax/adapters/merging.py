"""Merging several changes into one that is not their sum: TIES, DARE and KnOTS, on arrays [N, ...] of N members.

Elementwise rules depend on the basis they are applied in. Here that is core space, where nothing of a weight's size
exists; KnOTS brings a basis of its own and is the same in either.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from popax.adapters.changes import Factored, total
from popax.adapters.cohort import EXACT


def ties(x_NxP: jax.Array, weight_N: jax.Array, density: float) -> jax.Array:
    """TIES (arXiv 2306.01708): trim, elect signs by the larger mass, average those that agree, [P].

    density: the share of each member's entries that stay, the largest ones. As in PEFT, weights have no part in the
    election, and the average is of w x over those that agree; 0 where nobody has a say.
    """
    kept_NxP = _largest(x_NxP, density)
    sign_P = jnp.where(jnp.sum(kept_NxP, axis=0) >= 0, 1.0, -1.0)
    agrees_NxP = jnp.sign(kept_NxP) == sign_P[None]
    count_P = jnp.maximum(jnp.sum(agrees_NxP, axis=0), 1).astype(x_NxP.dtype)
    return jnp.sum(jnp.where(agrees_NxP, kept_NxP * weight_N[:, None], 0.0), axis=0) / count_P


def dare(key: jax.Array, x_NxP: jax.Array, weight_N: jax.Array, density: float) -> jax.Array:
    """DARE (arXiv 2311.03099): the weighted sum of members of whom a random share `density` stays, over that share."""
    keep_NxP = jax.random.bernoulli(key, density, x_NxP.shape)
    return jnp.sum(jnp.where(keep_NxP, x_NxP / density, 0.0) * weight_N[:, None], axis=0)


def knots(changes: Sequence[Factored], weight_N: jax.Array, density: float) -> Factored:
    """KnOTS with TIES (arXiv 2410.19735): [W_1 .. W_n] = U S [V_1 .. V_n], and the V_i are merged.

    Of one layer's changes; the decomposition is of the factors' small matrices: the left side is in the span of all A_i
    together, the right side block by block. A is (U S)^T, B the merged V.
    """
    both = total(changes, [1.0] * len(changes))
    q_DxJ, r_JxM = jnp.linalg.qr(both.a_RxD.mT)
    # [W_1 .. W_n] = Q R blockdiag(B_i): only R and the B_i's own triangles decide U, S and the rotation of each block.
    blocks = jnp.split(r_JxM, _ends([change.a_RxD.shape[0] for change in changes]), axis=1)
    rotated = [jnp.linalg.qr(change.b_RxF.mT) for change in changes]
    small_JxM = jnp.concatenate([_dot(block, r.mT) for block, (_, r) in zip(blocks, rotated, strict=True)], axis=1)
    u_JxK, s_K, vt_KxM = jnp.linalg.svd(small_JxM, full_matrices=False)
    pieces = jnp.split(vt_KxM, _ends([q.shape[1] for q, _ in rotated]), axis=1)
    v_NxKxF = jnp.stack([_dot(piece, q.mT) for piece, (q, _) in zip(pieces, rotated, strict=True)])
    merged = ties(v_NxKxF.reshape(len(changes), -1), weight_N, density).reshape(v_NxKxF.shape[1:])
    return Factored(s_K[:, None] * _dot(q_DxJ, u_JxK).mT, merged)


def _ends(sizes: Sequence[int]) -> list[int]:
    """Where to split an axis of pieces of these sizes."""
    return [sum(sizes[: index + 1]) for index in range(len(sizes) - 1)]


def _largest(x_NxP: jax.Array, density: float) -> jax.Array:
    """Each member's int(density * P) entries of the largest size; the others are zero."""
    size = x_NxP.shape[1]
    keep = int(density * size)
    if keep >= size:
        return x_NxP
    order_NxP = jnp.argsort(jnp.argsort(-jnp.abs(x_NxP), axis=1), axis=1)
    return jnp.where(order_NxP < keep, x_NxP, 0.0)


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=EXACT)
