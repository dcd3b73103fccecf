"""A new user's adapter made of others' in a catalog, committed as derived from them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from popax.adapters.cohort import Cohort
from popax.adapters.compose import Composed, How, Part, compose
from popax.errors import BaseMismatchError, ComposeError
from popax.store.catalog import Catalog
from popax.store.layout import RowLayout
from popax.store.manifest import Manifest


class Term(NamedTuple):
    """A revision and its weight in the composition."""

    manifest: Manifest
    weight: float = 1.0


def compose_revisions(
    catalog: Catalog,
    terms: Sequence[Term],
    into: str,
    how: How = "cat",
    *,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> tuple[Manifest, Composed]:
    """Compose these revisions and commit the result as the next revision of the user `into`, a candidate.

    It names all of them in `derived_from`: who deletes one of those users is told of it. Its provenance says how it was
    made, and what its rank left out. Raises BaseMismatchError where they are of several bases, ComposeError as
    `popax.adapters.compose.compose`, and what `Catalog.commit` raises.
    """
    if not terms:
        raise ComposeError("there is no adapter to compose")
    bases = {term.manifest.base_digest: term.manifest.shown for term in terms}
    if len(bases) > 1:
        named = ", ".join(f"{shown} of the base {digest[:16]}" for digest, shown in bases.items())
        raise BaseMismatchError(f"{named}: adapters of different bases change different weights; migrate them first")
    made = compose([part_of(catalog, term) for term in terms], how, rank=rank, density=density, seed=seed)
    shared = catalog.shared(catalog.cohort_of(terms[0].manifest)) if how == "linear" else None
    layout = RowLayout.of(made.cohort.abstract())
    stored = catalog.cohort(made.cohort.config, made.cohort.specs, next(iter(bases)), layout, shared or None)
    composition = {
        "how": how,
        "terms": [[term.manifest.user, term.manifest.revision, term.weight] for term in terms],
        "error": max(made.error.values(), default=0.0),
        **({"density": density} if how in ("ties", "dare", "knots") else {}),
        **({"seed": seed} if how == "dare" else {}),
        **({"rank": rank} if rank is not None else {}),
    }
    manifest = catalog.commit(
        stored,
        into,
        jax.tree.map(np.asarray, made.adapter),
        provenance={"composition": composition},
        derived_from=[(term.manifest.user, term.manifest.revision) for term in terms],
    )
    return manifest, made


def part_of(catalog: Catalog, term: Term) -> Part:
    """The revision's arrays, and its weight."""
    stored = catalog.cohort_of(term.manifest)
    adapter, _ = catalog.load(term.manifest.user, term.manifest.revision)
    return Part(Cohort(stored.config, tuple(stored.specs.values())), adapter, catalog.shared(stored), term.weight)
