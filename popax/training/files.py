"""What a population run reads and writes: revisions in the catalog, checkpoints in its directory."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from popax.adapters.cohort import Cohort
from popax.data.users import UserDataset
from popax.modeling.base import Base
from popax.population.slots import SlotTable
from popax.population.state import PopulationState, selected_adapters
from popax.store.catalog import Catalog, Commit
from popax.store.checkpoint import CheckpointStore
from popax.store.layout import RowLayout
from popax.training.config import TrainConfig
from popax.training.members import Finished
from popax.training.record import data_provenance
from popax.training.stream import Seating
from popax.types import AdapterState


class RunFiles:
    """The cohort in the catalog, its users' revisions, and the run's checkpoints."""

    def __init__(
        self,
        *,
        base: Base,
        cohort: Cohort,
        config: TrainConfig,
        dataset: UserDataset,
        catalog: Catalog,
        directory: Path,
        run: str,
    ):
        self._config, self._dataset, self._catalog, self._run = config, dataset, catalog, run
        self.shared = shared_arrays(base, cohort, catalog)
        layout = RowLayout.of(cohort.abstract())
        self._stored = catalog.cohort(config.adapter, cohort.specs, base.digest, layout, self.shared or None)
        self._checkpoints = CheckpointStore(directory / "checkpoints", cohort=self._stored, shared=self.shared)

    def commit(self, finished: Sequence[Finished]) -> None:
        """All of these users in one transaction; runs on the writer's thread."""
        self._catalog.commit_batch(self._stored, [self._revision(one) for one in finished])

    def _revision(self, one: Finished) -> Commit:
        settings = {name: getattr(self._config, name) for name in ("learning_rate", "steps", "clip_norm")}
        return Commit(
            one.user,
            jax.tree.map(np.asarray, one.adapter),
            parent="latest",
            metrics={name: np.asarray(value).item() for name, value in one.counters.items()},
            provenance={"data": data_provenance(self._dataset, one.user), "seed": self._config.seed},
            hparams=settings,
            run=self._run,
        )

    def save(self, seating: Seating) -> None:
        """A checkpoint: the adapters that users would keep as one item, all else as another."""
        if self._checkpoints.latest() == seating.iteration:
            return
        adapters, rest = _apart(seating.state)
        self._checkpoints.save(
            seating.iteration,
            adapters=adapters,
            train_state=rest,
            users=seating.table.users,
            record={
                "run": self._run,
                "table": dataclasses.asdict(seating.table),
                "parents": list(seating.parents),
            },
        )

    def restore(self, fresh: Seating) -> Seating | None:
        """The latest checkpoint, placed as `fresh` is; None where there is none."""
        if self._checkpoints.latest() is None:
            return None
        adapters, rest = _apart(fresh.state)
        restored = self._checkpoints.restore(adapters=adapters, train_state=rest)
        table = restored.record["table"]
        return Seating(
            restored.step,
            SlotTable(users=tuple(table["users"]), since=tuple(table["since"]), next=table["next"]),
            tuple(restored.record["parents"]),
            _together(restored.adapters, restored.train_state),
        )

    def close(self) -> None:
        self._checkpoints.close()


def shared_arrays(base: Base, cohort: Cohort, catalog: Catalog) -> AdapterState:
    """What all users of the cohort share: the catalog's own where it has them, so that they are the same bytes."""
    if not cohort.method.shared_axes:
        return {}
    stored = catalog.find_cohort(cohort.config, base.digest, RowLayout.of(cohort.abstract()))
    if stored is not None:
        return catalog.shared(stored)
    return jax.jit(lambda params: cohort.shared(lambda site: base.model.site_weight(params, site)))(base.params)


def _apart(state: PopulationState) -> tuple[AdapterState, PopulationState]:
    if state.best is None:
        return state.adapters, state._replace(adapters={})
    return selected_adapters(state), state._replace(best=state.best._replace(adapter={}))


def _together(adapters: AdapterState, rest: PopulationState) -> PopulationState:
    if rest.best is None:
        return rest._replace(adapters=adapters)
    return rest._replace(best=rest.best._replace(adapter=adapters))
