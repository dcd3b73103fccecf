"""Adapters from the catalog to the slots of one batch: who is asked for, whether they fit together, how they stack."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from popax.adapters.apply import bind_slots
from popax.adapters.cohort import Cohort
from popax.errors import PopulationError
from popax.store.catalog import Catalog
from popax.store.manifest import Manifest
from popax.types import NO_ADAPT, Adapt, AdapterState

BASE_ONLY = "base"


class Request(NamedTuple):
    """Whose adapter a row wants; revision None is the latest, user None is the base alone."""

    user: str | None
    revision: int | None = None


class Pool(NamedTuple):
    """Adapters stacked for `bind_slots`, and the revision in each slot."""

    cohort: Cohort
    shared: AdapterState
    adapters: AdapterState
    manifests: tuple[Manifest, ...]


def parse_request(text: str, catalog: Catalog) -> Request:
    """ "base", "user" or "user@revision". An id that itself ends in @digits is the user where the catalog has one."""
    if text == BASE_ONLY:
        return Request(None)
    user, at, revision = text.rpartition("@")
    if at and user and revision.isascii() and revision.isdigit() and not catalog.exists(text):
        return Request(user, int(revision))
    return Request(text)


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

    return {name: at_site(name, 1 if spec.info.layers else 0) for name, spec in cohort.specs.items()}


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


def load_rows(catalog: Catalog, requests: Sequence[Request], base_digest: str) -> tuple[Pool | None, list[int]]:
    """(the pool, the slot of each request), each revision loaded once; slot -1 is the base alone.

    The pool is None where every request is for the base. Errors as `Catalog.load` and `one_cohort`.
    """
    wanted = list(dict.fromkeys(request for request in requests if request.user is not None))
    if not wanted:
        return None, [-1] * len(requests)
    loaded = [catalog.load(str(request.user), request.revision, base_digest=base_digest) for request in wanted]
    manifests = tuple(manifest for _, manifest in loaded)
    cohort, shared = one_cohort(catalog, manifests)
    pool = Pool(cohort, shared, stack_slots(cohort, [adapter for adapter, _ in loaded]), manifests)
    return pool, [wanted.index(request) if request in wanted else -1 for request in requests]


def bind_rows(pool: Pool | None, slots: Sequence[int]) -> Adapt:
    """What `generate` is given for a batch whose rows have these slots."""
    if pool is None:
        return NO_ADAPT
    return bind_slots(pool.cohort, pool.adapters, pool.shared, jnp.asarray(slots, jnp.int32))


def _described(manifest: Manifest) -> str:
    return f"{manifest.config['method']} rank {manifest.config['rank']}"
