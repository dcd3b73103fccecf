"""Adapters from the catalog to the slots of one batch: who is asked for, whether they fit together, how they stack."""

import contextlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from popax.adapters.cohort import Cohort
from popax.errors import PopulationError
from popax.residency import Request, Residency
from popax.store.catalog import Catalog
from popax.store.manifest import Manifest
from popax.store.pointers import LATEST, PROMOTED, Which
from popax.types import NO_ADAPT, Adapt, AdapterState

BASE_ONLY = "base"


def parse_request(text: str, catalog: Catalog, default: Which = None) -> Request:
    """ "base", "user", or "user@" and a revision: a number, latest, promoted, or a tag of theirs.

    default: the revision of a user without one. An id that itself ends so is the user where the catalog has one.
    """
    if text == BASE_ONLY:
        return Request(None)
    user, at, revision = text.rpartition("@")
    if at and user and not catalog.exists(text):
        if revision.isascii() and revision.isdigit():
            return Request(user, int(revision))
        [record] = catalog.records([user])
        if record is not None and (revision in (LATEST, PROMOTED) or revision in record.tags):
            return Request(user, revision)
    return Request(text, default)


def stack_slots(cohort: Cohort, adapters: Sequence[AdapterState]) -> AdapterState:
    """One-user states [L, ...] -> {site: {leaf: [L, S, ...]}}, [S, ...] at sites outside the layer stack.

    Raises PopulationError where there is none, or where one has other leaves or shapes than its cohort.
    """
    if not adapters:
        raise PopulationError("no adapter to stack: a pool has at least one slot")
    expected = jax.tree.map(lambda leaf: leaf.shape, cohort.abstract())
    for index, adapter in enumerate(adapters):
        found = jax.tree.map(np.shape, adapter)
        if found != expected:
            raise PopulationError(f"adapter {index} has leaves {found}, its cohort {expected}: they do not stack")

    def at_site(name: str, axis: int) -> dict[str, jax.Array]:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=axis), *(each[name] for each in adapters))

    return {name: at_site(name, int(layered)) for name, layered in cohort.layered.items()}


def one_cohort(catalog: Catalog, manifests: Sequence[Manifest]) -> tuple[Cohort, AdapterState]:
    """The cohort that all these revisions belong to, and what its users share. Errors as `check_one_cohort`."""
    check_one_cohort(manifests)
    stored = catalog.cohort_of(manifests[0])
    return Cohort(stored.config, tuple(stored.specs.values())), catalog.shared(stored)


def check_one_cohort(manifests: Sequence[Manifest]) -> None:
    """Raises PopulationError where they belong to several: other shapes or methods do not stack in one batch yet."""
    first = manifests[0]
    for other in manifests[1:]:
        if other.cohort != first.cohort:
            raise PopulationError(
                f"{first.shown} ({_described(first)}) and {other.shown} ({_described(other)}) belong to different "
                "cohorts, which do not mix in one batch: name users of one cohort only"
            )


def residency_for(catalog: Catalog, requests: Sequence[Request], base_digest: str) -> Residency | None:
    """A residency with as many slots as these requests have adapters; None where all are for the base.

    Raises what `Catalog.load` does, and PopulationError where they are of several cohorts.
    """
    named = list(dict.fromkeys(request for request in requests if request.user is not None))
    if not named:
        return None
    asked = [(str(request.user), request.revision) for request in named]
    manifests = catalog.resolve(asked, base_digest=base_digest)
    check_one_cohort(manifests)
    return Residency(catalog, catalog.cohort_of(manifests[0]), slots=len(named))


@contextlib.contextmanager
def leased(
    residency: Residency | None, requests: Sequence[Request]
) -> Iterator[tuple[Adapt, tuple[Manifest | None, ...]]]:
    """(what `generate` is given, the manifest of each row, None for the base), held while the block runs."""
    if residency is None:
        yield NO_ADAPT, (None,) * len(requests)
        return
    with residency.lease(requests) as lease, residency.bound(lease) as adapt:
        yield adapt, lease.manifests


def _described(manifest: Manifest) -> str:
    return f"{manifest.config['method']} rank {manifest.config['rank']}"
