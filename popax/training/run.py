"""A whole population run: base and text in, revisions in the catalog out; stopped and resumed at will."""

import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from popax.adapters.cohort import Cohort
from popax.data.pipeline import UserPipeline
from popax.data.users import UserDataset
from popax.errors import ConfigError, DataError
from popax.modeling.base import Base
from popax.population.state import PopulationState, selected_adapters
from popax.population.slots import SlotTable
from popax.store.catalog import Catalog, Commit
from popax.store.checkpoint import CheckpointStore
from popax.store.layout import RowLayout
from popax.training.compiled import compile_programs
from popax.training.config import TrainConfig
from popax.training.members import Finished, MemberSource, RevisionWriter
from popax.training.stream import Hooks, PopulationStream, Progress
from popax.types import AdapterState


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunReport:
    """What a run did. finished is False where it was stopped; the same call then continues it."""

    run: str
    trained: tuple[str, ...]
    up_to_date: int
    iterations: int
    finished: bool


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The run's identity and its queue, in `run.json`: a resumed run must be the same run."""

    run: str
    settings: dict[str, Any]
    queue: list[str]

    @classmethod
    def open(cls, directory: Path, settings: dict[str, Any], queue: Callable[[], list[str]]) -> "RunRecord":
        """The record in this directory, or a new one. Raises ConfigError where the directory holds another run."""
        path = directory / "run.json"
        if path.exists():
            record = cls(**json.loads(path.read_text()))
            differing = sorted(k for k in settings | record.settings if settings.get(k) != record.settings.get(k))
            if differing:
                raise ConfigError(
                    f"{directory} holds run {record.run} with other settings ({', '.join(differing)}): "
                    "choose another directory, or give the settings it was started with"
                )
            return record
        record = cls(uuid.uuid4().hex, settings, queue())
        directory.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(record), indent=1))
        os.replace(partial, path)
        return record


def data_provenance(dataset: UserDataset, user: str) -> dict[str, Any]:
    """How many examples a user has, and a digest of them: equal digests mean nothing new to learn."""
    digest = hashlib.sha256()
    examples = dataset.examples(user)
    for example in examples:
        digest.update(repr(example).encode())
    return {"examples": len(examples), "digest": digest.hexdigest()}


def users_with_new_data(dataset: UserDataset, catalog: Catalog, users: Sequence[str], base_digest: str) -> list[str]:
    """The users whose latest revision is of another base, or was trained on other data than they have now."""

    def is_new(user: str) -> bool:
        if not catalog.exists(user):
            return True
        latest = catalog.history(user)[-1]
        return latest.base_digest != base_digest or latest.provenance.get("data") != data_provenance(dataset, user)

    return [user for user in users if is_new(user)]


def train_population(
    base: Base,
    dataset: UserDataset,
    pipeline: UserPipeline,
    config: TrainConfig,
    *,
    directory: Path,
    catalog: Catalog,
    users: Sequence[str] | None = None,
    everyone: bool = False,
    on_round: Callable[[Progress, Any], None] = lambda progress, metrics: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> RunReport:
    """Train these users (default: all in the dataset) and commit a revision for each.

    Users whose latest revision already covers their data are left out, unless `everyone`. `directory` holds the run's
    record and checkpoints: called again with the same arguments after any kind of stop, the run goes on from the
    latest checkpoint and ends as if it had never stopped.
    """
    cohort = Cohort.of(config.adapter, base.model.sites())
    layout = RowLayout.of(cohort.abstract())
    run = _Run(base, cohort, layout, dataset, config, catalog, directory)
    names = list(dataset.users()) if users is None else list(users)
    if not names:
        raise DataError("no users to train: the dataset is empty, or the selection left nobody")
    record = RunRecord.open(
        directory,
        run.settings(pipeline),
        lambda: names if everyone else users_with_new_data(dataset, catalog, names, base.digest),
    )
    source = MemberSource(
        cohort,
        config,
        steps_of=lambda user: config.steps_for(
            pipeline.rows(user, "past").tokens_BxT.shape[0], pipeline.config.batch_size
        ),
        warm_up=lambda user: pipeline.rows(user, "past"),
        catalog=catalog,
        base_digest=base.digest,
        run=record.run,
    )
    shared = run.shared()
    stored = catalog.cohort(config.adapter, cohort.specs, base.digest, layout, shared or None)
    writer = RevisionWriter(lambda finished: run.commit(stored, record.run, finished))
    stream = PopulationStream(
        base=base.params,
        shared=shared,
        cohort=cohort,
        config=config,
        programs=compile_programs(base.model, cohort, config),
        data=pipeline,
        queue=record.queue,
        source=source,
        writer=writer,
        hooks=Hooks(on_round=on_round, save=lambda progress: run.save(record, progress), stop_requested=stop_requested),
    )
    try:
        progress = stream.run(run.restore(stream.fresh()))
    finally:
        source.close()
        writer.close()
        run.checkpoints.close()
    done = not progress.table.occupied
    return RunReport(
        run=record.run,
        trained=tuple(record.queue[: progress.table.next] if done else _left(record.queue, progress.table)),
        up_to_date=len(names) - len(record.queue),
        iterations=progress.iteration,
        finished=done,
    )


def _left(queue: Sequence[str], table: SlotTable) -> list[str]:
    seated = set(table.users)
    return [user for user in queue[: table.next] if user not in seated]


class _Run:
    """What one run reads and writes on disk."""

    def __init__(
        self,
        base: Base,
        cohort: Cohort,
        layout: RowLayout,
        dataset: UserDataset,
        config: TrainConfig,
        catalog: Catalog,
        directory: Path,
    ):
        self._base, self._cohort, self._layout = base, cohort, layout
        self._dataset, self._config, self._catalog = dataset, config, catalog
        self.checkpoints = CheckpointStore(directory / "checkpoints")

    def settings(self, pipeline: UserPipeline) -> dict[str, Any]:
        """What a resumed run must share with the run it resumes."""
        plain = {
            field.name: getattr(self._config, field.name)
            for field in dataclasses.fields(self._config)
            if field.name not in ("adapter", "optimizer", "schedule", "early_stop")
        }
        stop = self._config.early_stop
        settings = {
            "base": self._base.digest,
            "adapter": self._cohort.config.to_dict(),
            "train": plain,
            "early_stop": dataclasses.asdict(stop) if stop else None,
            "data": dataclasses.asdict(pipeline.config),
        }
        return json.loads(json.dumps(settings))

    def shared(self) -> AdapterState:
        """The frozen arrays that all users share: the catalog's where it has them, so that they are the same bytes."""
        make = lambda: self._cohort.shared(lambda site: self._base.model.site_weight(self._base.params, site))  # noqa: E731
        if not self._cohort.method.shared_axes:
            return {}
        known = self._catalog.find_cohort(self._config.adapter, self._base.digest, self._layout)
        return make() if known is None else self._catalog.shared(known)

    def commit(self, stored: Any, run: str, finished: Sequence[Finished]) -> None:
        """One transaction for all of these users; runs on the writer's thread."""
        commits = []
        for one in finished:
            adapter = jax.tree.map(np.asarray, one.adapter)
            metrics = {name: float(value) for name, value in one.metrics.items()}
            metrics |= {name: int(value) for name, value in one.counters.items()}
            provenance = {"data": data_provenance(self._dataset, one.user), "seed": self._config.seed}
            settings = {"learning_rate": self._config.learning_rate, "steps": self._config.steps}
            commits.append(
                Commit(
                    one.user, adapter, parent="latest", metrics=metrics, provenance=provenance, hparams=settings, run=run
                )
            )
        self._catalog.commit_batch(stored, commits)

    def save(self, record: RunRecord, progress: Progress) -> None:
        """An Orbax checkpoint: the adapters users would keep as one item, all else as another."""
        state = progress.state
        rest = state._replace(adapters=None) if state.best is None else state._replace(
            best=state.best._replace(adapter=None)
        )
        table = dataclasses.asdict(progress.table)
        self.checkpoints.save(
            progress.iteration,
            adapters=selected_adapters(state),
            train_state=rest,
            record={"run": record.run, "table": table, "parents": list(progress.parents)},
        )

    def restore(self, fresh: Progress) -> Progress | None:
        """The latest checkpoint's progress, or None where there is none."""
        if self.checkpoints.latest() is None:
            return None
        state = fresh.state
        rest = state._replace(adapters=None) if state.best is None else state._replace(
            best=state.best._replace(adapter=None)
        )
        iteration, adapters, rest, record = self.checkpoints.restore(adapters=selected_adapters(state), train_state=rest)
        state = _joined(rest, adapters)
        table = record["table"]
        return Progress(
            iteration,
            SlotTable(users=tuple(table["users"]), since=tuple(table["since"]), next=table["next"]),
            tuple(record["parents"]),
            state,
        )


def _joined(rest: PopulationState, adapters: AdapterState) -> PopulationState:
    if rest.best is None:
        return rest._replace(adapters=adapters)
    return rest._replace(best=rest.best._replace(adapter=adapters))
