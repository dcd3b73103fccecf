"""Bases for clusters of users: at each site and layer the two subspaces that hold most of their weight updates.

Joint diagonalisation in its full form (arXiv 2407.00066, section 3): maximise sum_i w_i ||p W_i q^T||^2 over
orthonormal rows p [S, D], q [S, F], for W_i = a_i^T b_i. With q held, that is the trace of p M p^T for a positive M,
which each step of orthogonal iteration raises; so do both by turns, without ever forming a D x F matrix.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from popax.store.basis import Basis, Factors, factors, paired_sites
from popax.store.cohort import StoredCohort

ITERATIONS = 24
ROUNDS = 8


def fit_bases(
    cohort: StoredCohort, rows: Sequence[np.ndarray], *, rank: int, clusters: int = 1, seed: int = 0
) -> tuple[list[Basis], np.ndarray]:
    """At most `clusters` bases, and which of them each of these packed rows is nearest to, int64 [N].

    Each user counts alike, whatever their norm; an update of zero is everybody's. The start is one user's own subspaces
    for each cluster, the next always the user whom those before hold least of; then users and bases settle by turns.
    Raises CatalogError where the cohort has no pairs of factors.
    """
    stacks = _stacks(cohort, rows)
    rng = np.random.default_rng(seed)
    norm_N = np.sqrt(_energy(stacks, None))
    weight_N = np.where(norm_N > 0, 1 / np.maximum(norm_N, 1e-30), 0.0) ** 2
    bases = _seeds(stacks, rank, weight_N, clusters, rng)
    nearest_N = _nearest(stacks, bases)
    for _ in range(ROUNDS if len(bases) > 1 else 0):
        members = [np.where(nearest_N == index, weight_N, 0.0) for index in range(len(bases))]
        refitted = [_fit(stacks, weights, rank, rng) for weights in members if weights.any()]
        settled = len(refitted) == len(bases)
        before_N, bases = nearest_N, refitted
        nearest_N = _nearest(stacks, bases)
        if settled and (before_N == nearest_N).all():
            break
    layered = {name for name in stacks if cohort.specs[name].info.layers}
    return [Basis(_as_arrays(one, layered)) for one in bases], nearest_N


def nearest_bases(cohort: StoredCohort, bases: Sequence[Basis], rows: Sequence[np.ndarray]) -> np.ndarray:
    """Which of the bases holds most of each row's update, int64 [N]."""
    # Outside the layer stack a basis has no L: broadcasting gives it the one layer that the factors have here.
    plain = [{name: (leaves["a"], leaves["b"]) for name, leaves in basis.arrays.items()} for basis in bases]
    return _nearest(_stacks(cohort, rows), plain)


def _as_arrays(basis: Mapping[str, Factors], layered: set[str]) -> dict[str, dict[str, np.ndarray]]:
    return {name: {"a": p, "b": q} if name in layered else {"a": p[0], "b": q[0]} for name, (p, q) in basis.items()}


def _stacks(cohort: StoredCohort, rows: Sequence[np.ndarray]) -> dict[str, Factors]:
    """{site: (a [N, L, R, D] with the scale in it, b [N, L, R, F])}; L is 1 outside the stack."""
    tree_N, found = cohort.layout.unpack(np.stack(rows)), {}
    for name in paired_sites(cohort):
        spec = cohort.specs[name]
        a, b = factors(tree_N[name])
        if not spec.info.layers:
            a, b = a[:, None], b[:, None]
        found[name] = (a * np.asarray(spec.scales, np.float32)[:, None, None], b)
    return found


def _seeds(
    stacks: Mapping[str, Factors], rank: int, weight_N: np.ndarray, clusters: int, rng
) -> list[dict[str, Factors]]:
    alive: list[int] = np.flatnonzero(weight_N).tolist()
    if clusters == 1 or len(alive) <= 1:
        return [_fit(stacks, weight_N, rank, rng)]
    chosen, held_N = [int(rng.choice(alive))], np.zeros(len(weight_N))
    bases = []
    while True:
        only = np.zeros(len(weight_N))
        only[chosen[-1]] = weight_N[chosen[-1]]
        bases.append(_fit(stacks, only, rank, rng))
        held_N = np.maximum(held_N, weight_N * _energy(stacks, bases[-1]))
        rest = [user for user in alive if user not in chosen]
        if len(bases) == clusters or not rest:
            return bases
        chosen.append(min(rest, key=lambda user: held_N[user]))


def _nearest(stacks: Mapping[str, Factors], bases: Sequence[Mapping[str, Factors]]) -> np.ndarray:
    return np.argmax([_energy(stacks, basis) for basis in bases], axis=0)


def _energy(stacks: Mapping[str, Factors], basis: Mapping[str, Factors] | None) -> np.ndarray:
    """||p W q^T||^2 of each user over all sites [N]; of W itself without a basis."""
    found_N = np.zeros(len(next(iter(stacks.values()))[0]))
    for name, (a, b) in stacks.items():
        if basis is not None:
            p, q = basis[name]
            a, b = a @ _t(p), b @ _t(q)
        found_N += np.sum((a @ _t(a)).astype(np.float64) * (b @ _t(b)), axis=(1, 2, 3))
    return found_N


def _fit(stacks: Mapping[str, Factors], weight_N: np.ndarray, rank: int, rng) -> dict[str, Factors]:
    """The two subspaces at each site of the users with a weight; of no more dimensions than their side has."""
    there = np.flatnonzero(weight_N)
    root_N = np.sqrt(weight_N[there]).astype(np.float32)[:, None, None, None]
    found = {}
    for name, (a, b) in stacks.items():
        a_NxLxRxD, b_NxLxRxF = a[there] * root_N, b[there]
        q_LxSxF = _orthonormal(
            rng.standard_normal((b.shape[1], min(rank, b.shape[-1]), b.shape[-1])).astype(np.float32)
        )
        p_LxSxD = _orthonormal(
            rng.standard_normal((a.shape[1], min(rank, a.shape[-1]), a.shape[-1])).astype(np.float32)
        )
        for _ in range(ITERATIONS if len(there) else 0):
            p_LxSxD = _raised(p_LxSxD, a_NxLxRxD, b_NxLxRxF @ _t(q_LxSxF))
            q_LxSxF = _raised(q_LxSxF, b_NxLxRxF, a_NxLxRxD @ _t(p_LxSxD))
        found[name] = (p_LxSxD, q_LxSxF)
    return found


def _raised(p_LxSxD: np.ndarray, a_NxLxRxD: np.ndarray, other_NxLxRxS: np.ndarray) -> np.ndarray:
    """One step p <- orth(p M), M = sum_i a_i^T (c_i c_i^T) a_i for what the other side leaves of b, c_i."""
    gram_NxLxRxR = other_NxLxRxS @ _t(other_NxLxRxS)
    seen_NxLxSxR = p_LxSxD @ _t(a_NxLxRxD) @ gram_NxLxRxR
    moved_LxSxD = np.einsum("nlsr,nlrd->lsd", seen_NxLxSxR, a_NxLxRxD, optimize=True)
    # Where there is nothing in M the old rows stay: a factor of zeros has every basis.
    return np.where(np.abs(moved_LxSxD).max(axis=(1, 2), keepdims=True) > 0, _orthonormal(moved_LxSxD), p_LxSxD)


def _orthonormal(x_LxSxD: np.ndarray) -> np.ndarray:
    return _t(np.linalg.qr(_t(x_LxSxD))[0])


def _t(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, -1, -2)
