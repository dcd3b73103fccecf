"""A population carried over to a new base: each adapter re-applied, or taught by the old base, its gain measured before
and after, and committed as a revision that is derived from the one it came from."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from popax.adapters.cohort import Cohort
from popax.data.pipeline import UserPipeline
from popax.errors import BaseMismatchError, PopulationError
from popax.evaluation.columns import EvalConfig, HeldOut, Scorer, bits_per_byte
from popax.modeling.base import Base
from popax.objectives.sft import sft
from popax.serving.pool import one_cohort
from popax.store.catalog import Catalog
from popax.store.commit import Commit
from popax.store.layout import RowLayout
from popax.store.manifest import Manifest
from popax.training.config import TrainConfig
from popax.training.distill import Distiller
from popax.training.files import shared_arrays
from popax.training.members import user_key
from popax.training.reapply import reapplied
from popax.types import AdapterState


class Migrated(NamedTuple):
    """One user. how: "reapplied" or "distilled". gain_before: bits per byte of held-out text that the adapter saves on
    the old base; gain_after: on the new one; gain_reapplied: there, of the re-applied one (NaN without such text, or
    where the new base has adapters of other shapes). update_error: ||W' - W|| / ||W|| of the re-applied update (NaN
    there)."""

    user: str
    source: int
    revision: int
    how: str
    gain_before: float
    gain_reapplied: float
    gain_after: float
    update_error: float


def migrate(
    old: Base,
    new: Base,
    data: UserPipeline,
    catalog: Catalog,
    users: Sequence[str],
    config: EvalConfig,
    *,
    distillation: TrainConfig | None = None,
) -> Iterator[list[Migrated]]:
    """Carry these users' latest revisions over to the new base, `config.group` at a time, and commit them.

    Without training: the same weight update, or the nearest that the method has there. distillation: from there on each
    is trained to say what the old base said with the old adapter (`Distiller`); then the new base may have adapters of
    other shapes, which begin afresh. Users whose latest revision is the new base's already are passed over: an
    interrupted migration goes on. Raises BaseMismatchError where a revision is of neither base, PopulationError where
    the new base's adapters have other shapes and there is no distillation.
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
    target = Cohort.of(stored.config, new.model.sites())
    layout = RowLayout.of(target.abstract())
    if layout != stored.layout and distillation is None:
        raise _other_shapes(stored.layout, layout)
    new_shared = jax.tree.map(np.asarray, shared_arrays(new, target, catalog))
    into = catalog.cohort(stored.config, target.specs, new.digest, layout, new_shared or None)
    before = Scorer(sft(old.model), cohort, old.params, old_shared, config)
    after = Scorer(sft(new.model), target, new.params, new_shared, config)
    distiller = distillation and Distiller(
        old,
        new,
        (cohort, target),
        (old_shared, new_shared),
        data,
        distillation,
        group=config.group,
        batch_size=data.config.batch_size,
    )
    for start in range(0, len(manifests), config.group):
        group = manifests[start : start + config.group]
        adapters_N = stored.layout.unpack(np.stack(catalog.read_rows(group)))
        unknown_N = np.full(len(group), np.nan)
        if layout == stored.layout:
            moved_N, error_N = reapplied(target, old_shared, new_shared, adapters_N)
            reapplied_N = _gains(after, data, group, moved_N)
        else:
            moved_N, error_N, reapplied_N = _fresh(target, group, distillation), unknown_N, unknown_N
        gain_N, kept_N = reapplied_N, np.zeros(len(group), np.int32)
        if distiller is not None:
            moved_N, kept_N = distiller.refit([one.user for one in group], adapters_N, moved_N)
            gain_N = _gains(after, data, group, moved_N)
        told = [
            Migrated(one.user, one.revision, 0, "distilled" if kept else "reapplied", *map(float, numbers))
            for one, kept, *numbers in zip(
                group, kept_N, _gains(before, data, group, adapters_N), reapplied_N, gain_N, error_N, strict=True
            )
        ]
        rows = catalog.pack(into, moved_N)
        commits = [_commit(one, row, old, migrated) for one, row, migrated in zip(group, rows, told, strict=True)]
        made = catalog.commit_batch(into, commits)
        yield [one._replace(revision=new_one.revision) for one, new_one in zip(told, made, strict=True)]


def _fresh(target: Cohort, group: Sequence[Manifest], config: TrainConfig | None) -> AdapterState:
    seed = 0 if config is None else config.seed
    made = [target.init(user_key(seed, manifest.user)) for manifest in group]
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *made)


def _other_shapes(old: RowLayout, new: RowLayout) -> PopulationError:
    mine, theirs = ({leaf.name: leaf.shape for leaf in layout.leaves} for layout in (old, new))
    names = [name for name in sorted(mine | theirs) if mine.get(name) != theirs.get(name)]
    shown = ", ".join(f"{name}: {mine.get(name)} and {theirs.get(name)}" for name in names[:3])
    return PopulationError(
        f"the new base has adapters of other shapes ({shown}): they cannot be re-applied; distil them "
        "(--distill_steps), or train the users on it"
    )


def _gains(scorer: Scorer, data: HeldOut, group: Sequence[Manifest], adapters_N: AdapterState) -> np.ndarray:
    users = [manifest.user for manifest in group]
    place = {user: index for index, user in enumerate(users)}

    def own(asked: Sequence[str]) -> AdapterState:
        return jax.tree.map(lambda leaf: leaf[[place[user] for user in asked]], adapters_N)

    return bits_per_byte(scorer.base_sums(data, users)) - bits_per_byte(scorer.adapter_sums(data, users, own))


def _commit(manifest: Manifest, row: np.ndarray, old: Base, migrated: Migrated) -> Commit:
    numbers = {name: getattr(migrated, name) for name in Migrated._fields[4:]}
    migration = {
        "from_base": old.digest,
        "how": migrated.how,
        **{name: None if math.isnan(value) else value for name, value in numbers.items()},
    }
    return Commit(
        manifest.user,
        row,
        parent=manifest.revision,
        provenance={**manifest.provenance, "migration": migration},
        hparams=manifest.hparams,
        derived_from=[(manifest.user, manifest.revision)],
    )
