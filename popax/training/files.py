"""What a population run reads and writes: revisions in the catalog, checkpoints in its directory."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from popax.adapters.cohort import Cohort
from popax.adapters.masters import has_masters
from popax.data.users import UserDataset
from popax.distributed.group import ProcessGroup
from popax.errors import CatalogError, CheckpointError, NonFiniteError, StorageError
from popax.modeling.base import Base
from popax.population.slots import SlotTable
from popax.population.state import PopulationState, selected_adapters
from popax.population.turns import Turns, converted
from popax.store.catalog import Catalog, Commit, Revision
from popax.store.checkpoint import CheckpointStore
from popax.store.layout import RowLayout
from popax.training.aside import SetAside
from popax.training.config import TrainConfig
from popax.training.members import Finished
from popax.training.news import data_provenance
from popax.training.record import CHECKPOINTS
from popax.training.stream import Seating
from popax.types import AdapterState, Params


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
        turns: Turns,
    ):
        self._config, self._dataset, self._catalog, self._run = config, dataset, catalog, run
        self._refused: list[SetAside] = []
        self._cohort = cohort
        self._turns = turns
        self._group, self._staged = ProcessGroup.current(), []
        self.shared = shared_arrays(base, cohort, catalog, turns.placement.mesh)
        layout = RowLayout.of(cohort.abstract())
        self._stored = self._group.leader_first(
            lambda: catalog.cohort(config.adapter, cohort.specs, base.digest, layout, self.shared or None)
        )
        self._checkpoints = CheckpointStore(directory / CHECKPOINTS, cohort=self._stored, shared=self.shared)

    def commit(self, finished: Sequence[Finished]) -> None:
        """All of these users in one transaction; runs on the writer's thread.

        One of several processes writes their rows into its own shard, where nobody sees them before `publish`.
        """
        commits = [self._revision(one) for one in finished]
        while commits:
            try:
                return self._write(commits)
            except NonFiniteError as error:
                if not error.users:
                    raise
                # A state that is finite in training may not be in fewer bits: that user keeps what they had.
                self._refused += [SetAside.of(user, error) for user in error.users]
                commits = [one for one in commits if one.user not in error.users]

    def _write(self, commits: Sequence[Commit]) -> None:
        if self._group.count == 1:
            self._catalog.commit_batch(self._stored, commits)
        else:
            self._staged += self._catalog.stage_batch(self._stored, commits, shard=self._group.index)

    def refused(self) -> list[SetAside]:
        """Users whose adapter could not be committed by any process since this was asked last."""
        told = self._group.gather([one.to_dict() for one in self._refused])
        self._refused = []
        return [SetAside(**one) for part in told for one in part]

    def publish(self, failure: BaseException | None) -> None:
        """What all processes wrote becomes visible in one transaction of process 0's, or nothing does."""
        if self._group.count == 1:
            return
        said_here = None if failure is None else f"{type(failure).__name__}: {failure}"
        told = self._group.gather({"failure": said_here, "staged": [staged.to_dict() for staged in self._staged]})
        failed = [f"process {index}: {one['failure']}" for index, one in enumerate(told) if one["failure"]]
        if failed:
            raise StorageError("; ".join(failed)) from failure
        everyone = [Revision.from_dict(record) for one in told for record in one["staged"]]
        if self._group.leads:
            refused = _failure_of(lambda: self._catalog.publish(self._stored, everyone, shards=self._group.count))
        else:
            refused = None
        if said := self._group.gather(refused)[0]:
            raise StorageError(f"process 0: {said}")
        self._staged = []

    def _revision(self, one: Finished) -> Commit:
        return Commit(
            one.user,
            jax.tree.map(np.asarray, one.adapter),
            parent="latest",
            metrics={name: np.asarray(value).item() for name, value in one.counters.items()},
            provenance={"data": data_provenance(self._dataset, one.user), "seed": self._config.seed},
            hparams=self._config.recorded_settings(),
            run=self._run,
            optimizer=None if one.optimizer is None else jax.tree.map(np.asarray, one.optimizer),
        )

    def save(self, seating: Seating) -> None:
        """A checkpoint: the adapters that users would keep as one item, all else as another."""
        if self._checkpoints.latest() == seating.iteration:
            return
        adapters, rest = self._apart(seating)
        self._checkpoints.save(
            seating.iteration,
            adapters=adapters,
            train_state=rest,
            users=seating.table.users,
            record={
                "run": self._run,
                "table": dataclasses.asdict(seating.table),
                "aside": [one.to_dict() for one in seating.aside],
            },
        )

    def restore(self, fresh: Seating) -> Seating | None:
        """The latest checkpoint, placed as `fresh` is; None where there is none."""
        if self._checkpoints.latest() is None:
            return None
        adapters, rest = self._apart(fresh)
        try:
            restored = self._checkpoints.restore(adapters=adapters, train_state=rest)
        except CheckpointError as error:
            if not has_masters(self._cohort):
                raise
            raise CheckpointError(
                f"{error}. A run of {self._config.adapter.dtype} adapters that stopped before they had float32 masters "
                "cannot go on: begin it again in another directory"
            ) from error
        table = restored.record["table"]
        return Seating(
            restored.step,
            SlotTable(users=tuple(table["users"]), next=table["next"]),
            self._turns.split_turns(_together(restored.adapters, restored.train_state)),
            tuple(SetAside(**one) for one in restored.record.get("aside", ())),
        )

    def _apart(self, seating: Seating) -> tuple[AdapterState, PopulationState]:
        """(what users would keep, as it is stored, and all else that the run goes on with)."""
        state = self._turns.join_turns(seating.states)
        if has_masters(self._cohort):
            return converted(selected_adapters(state), self._config.adapter.dtype), state
        if state.best is None:
            return state.adapters, state._replace(adapters={})
        return selected_adapters(state), state._replace(best=state.best._replace(adapter={}))

    def close(self) -> None:
        self._checkpoints.close()


def _failure_of(work: Callable[[], object]) -> str | None:
    """What it raised, whatever that is: the other processes wait to be told."""
    try:
        work()
    except CatalogError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def shared_arrays(base: Base, cohort: Cohort, catalog: Catalog, mesh: Mesh | None = None) -> AdapterState:
    """What all users of the cohort share: the catalog's own where it has them, so that they are the same bytes."""
    if not cohort.method.shared_axes:
        return {}
    stored = catalog.find_cohort(cohort.config, base.digest, RowLayout.of(cohort.abstract()))
    if stored is not None:
        return catalog.shared(stored)
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    def make(params: Params) -> AdapterState:
        return cohort.shared(*base.model.site_arrays(params))

    return jax.jit(make, out_shardings=everywhere)(base.params)


def _together(adapters: AdapterState, rest: PopulationState) -> PopulationState:
    """The inverse of `_apart`: what users would keep is only of use where the rest has no masters."""
    if rest.best is None:
        return rest if rest.adapters else rest._replace(adapters=adapters)
    return rest if rest.best.adapter else rest._replace(best=rest.best._replace(adapter=adapters))
