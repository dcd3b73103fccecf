"""A population carried over to a new base: each adapter re-applied, its gain measured before and after, and committed
as a revision that is derived from the one it came from."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from popax.adapters.cohort import Cohort
from popax.errors import BaseMismatchError, PopulationError
from popax.evaluation.columns import EvalConfig, HeldOut, Scorer, bits_per_byte
from popax.modeling.base import Base
from popax.objectives.sft import sft
from popax.serving.pool import one_cohort
from popax.store.catalog import Catalog
from popax.store.cohort import StoredCohort
from popax.store.commit import Commit
from popax.store.layout import RowLayout
from popax.store.manifest import Manifest
from popax.training.files import shared_arrays
from popax.training.reapply import reapplied
from popax.types import AdapterState


class Migrated(NamedTuple):
    """One user. gain_before: bits per byte of held-out text that the adapter saves on the old base; gain_after: on the
    new one (NaN without such text). update_error: ||W' - W|| / ||W|| of the weight update."""

    user: str
    source: int
    revision: int
    gain_before: float
    gain_after: float
    update_error: float


def migrate(
    old: Base, new: Base, data: HeldOut, catalog: Catalog, users: Sequence[str], config: EvalConfig
) -> Iterator[list[Migrated]]:
    """Re-apply these users' latest revisions to the new base, `config.group` at a time, and commit them.

    Users whose latest revision is the new base's already are passed over: an interrupted migration goes on. Raises
    BaseMismatchError where a revision is of neither base, PopulationError where the new base's sites have other shapes.
    """
    manifests = [one for one in catalog.resolve([(user, None) for user in users]) if one.base_digest != new.digest]
    for manifest in manifests:
        if manifest.base_digest != old.digest:
            raise BaseMismatchError(
                f"{manifest.shown} was made for the base {manifest.base_digest}, which is neither {old.digest} nor the "
                f"new {new.digest}; migrate it from the base that it was made for"
            )
    if not manifests:
        return
    cohort, old_shared = one_cohort(catalog, manifests)
    stored = catalog.cohort_of(manifests[0])
    target = _target(cohort, stored, new)
    new_shared = jax.tree.map(np.asarray, shared_arrays(new, target, catalog))
    into = catalog.cohort(stored.config, target.specs, new.digest, stored.layout, new_shared or None)
    before = Scorer(sft(old.model), cohort, old.params, old_shared, config)
    after = Scorer(sft(new.model), target, new.params, new_shared, config)
    for start in range(0, len(manifests), config.group):
        group = manifests[start : start + config.group]
        adapters_N = stored.layout.unpack(np.stack(catalog.read_rows(group)))
        moved_N, error_N = reapplied(target, old_shared, new_shared, adapters_N)
        gains = [_gains(scorer, data, group, adapters) for scorer, adapters in ((before, adapters_N), (after, moved_N))]
        rows = catalog.pack(into, moved_N)
        commits = [
            _commit(manifest, rows[at], old, float(gains[0][at]), float(gains[1][at]), float(error_N[at]))
            for at, manifest in enumerate(group)
        ]
        made = catalog.commit_batch(into, commits)
        yield [
            Migrated(one.user, one.revision, new_one.revision, float(b), float(a), float(error))
            for one, new_one, b, a, error in zip(group, made, *gains, error_N, strict=True)
        ]


def _target(cohort: Cohort, stored: StoredCohort, new: Base) -> Cohort:
    """The cohort on the new base, whose adapters are of the same shapes."""
    target = Cohort.of(stored.config, new.model.sites())
    layout = RowLayout.of(target.abstract())
    if layout != stored.layout:
        mine = {leaf.name: leaf.shape for leaf in stored.layout.leaves}
        theirs = {leaf.name: leaf.shape for leaf in layout.leaves}
        names = [name for name in sorted(mine | theirs) if mine.get(name) != theirs.get(name)]
        shown = ", ".join(f"{name}: {mine.get(name)} and {theirs.get(name)}" for name in names[:3])
        raise PopulationError(
            f"the new base has adapters of other shapes ({shown}): they cannot be re-applied; train the users on it"
        )
    return target


def _gains(scorer: Scorer, data: HeldOut, group: Sequence[Manifest], adapters_N: AdapterState) -> np.ndarray:
    users = [manifest.user for manifest in group]
    place = {user: index for index, user in enumerate(users)}

    def own(asked: Sequence[str]) -> AdapterState:
        return jax.tree.map(lambda leaf: leaf[[place[user] for user in asked]], adapters_N)

    return bits_per_byte(scorer.base_sums(data, users)) - bits_per_byte(scorer.adapter_sums(data, users, own))


def _commit(manifest: Manifest, row: np.ndarray, old: Base, before: float, after: float, error: float) -> Commit:
    migration = {
        "from_base": old.digest,
        "how": "reapplied",
        "update_error": error,
        "gain_before": None if math.isnan(before) else before,
        "gain_after": None if math.isnan(after) else after,
    }
    return Commit(
        manifest.user,
        row,
        parent=manifest.revision,
        provenance={**manifest.provenance, "migration": migration},
        hparams=manifest.hparams,
        derived_from=[(manifest.user, manifest.revision)],
    )
