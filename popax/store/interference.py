"""How much users' adapters disturb each other when they are added: cosines of their changes of the weights."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from popax.adapters.cohort import Cohort
from popax.adapters.measures import interference
from popax.errors import ComposeError
from popax.store.catalog import Catalog
from popax.store.manifest import Manifest


class Interference(NamedTuple):
    """cosine_NxN, norm_N: float32, in the order of `users`, whose revisions they are of."""

    users: tuple[str, ...]
    revisions: tuple[int, ...]
    cosine_NxN: np.ndarray
    norm_N: np.ndarray

    def pairs(self, count: int) -> list[dict[str, Any]]:
        """The pairs whose changes are most alike or most opposed, the largest |cosine| first."""
        above = np.triu_indices(len(self.users), 1)
        largest = np.argsort(-np.abs(self.cosine_NxN[above]), kind="stable")[:count]
        found = [(int(above[0][at]), int(above[1][at])) for at in largest]
        return [
            {"user": self.users[i], "other": self.users[j], "cosine": float(self.cosine_NxN[i, j])} for i, j in found
        ]

    def figures(self) -> dict[str, float]:
        """Of all pairs of two users: the mean cosine, and the mean and the largest of its size."""
        cosines = self.cosine_NxN[np.triu_indices(len(self.users), 1)]
        return {
            "users": len(self.users),
            "mean_cosine": float(cosines.mean()),
            "mean_abs_cosine": float(np.abs(cosines).mean()),
            "max_abs_cosine": float(np.abs(cosines).max()),
        }


def user_interference(
    catalog: Catalog, manifests: Sequence[Manifest], progress: Callable[[str], None] = lambda line: None
) -> Interference:
    """Of these revisions, which are of one cohort. Raises ComposeError where they are not, or fewer than two."""
    if len(manifests) < 2:
        raise ComposeError(f"{len(manifests)} users: interference is of at least two")
    if len(cohorts := {manifest.cohort for manifest in manifests}) > 1:
        raise ComposeError(
            f"these users are of {len(cohorts)} cohorts ({', '.join(sorted(cohorts))}): ask for one of them (--cohort)"
        )
    stored = catalog.cohort_of(manifests[0])
    cohort, shared = Cohort(stored.config, tuple(stored.specs.values())), catalog.shared(stored)
    if not cohort.adds:
        raise ComposeError(f"method={stored.config.method!r}: its changes of a weight are no products of factors")
    adapters_N = stored.layout.unpack(np.stack(catalog.read_rows(manifests)))
    progress(f"{len(manifests):,} rows read")
    cosine_NxN, norm_N = jax.jit(lambda adapters: interference(cohort, adapters, shared))(adapters_N)
    return Interference(
        users=tuple(manifest.user for manifest in manifests),
        revisions=tuple(manifest.revision for manifest in manifests),
        cosine_NxN=np.asarray(cosine_NxN),
        norm_N=np.asarray(norm_N),
    )
