"""A whole population run: base and text in, revisions in the catalog out; stopped and resumed at will."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from popax.adapters.cohort import Cohort
from popax.data.pipeline import UserPipeline
from popax.distributed.group import ProcessGroup
from popax.errors import DataError
from popax.modeling.base import Base
from popax.population.placement import Placement
from popax.population.step import StepMetrics
from popax.population.turns import Turns
from popax.sharding import ShardingRules
from popax.store.catalog import Catalog
from popax.training.compiled import compile_programs
from popax.training.config import TrainConfig
from popax.training.files import RunFiles
from popax.training.members import MemberSource, RevisionWriter
from popax.training.record import RunRecord, users_with_new_data
from popax.training.stream import Hooks, PopulationStream, Seating


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunReport:
    """What a run did. finished is False where it was stopped; the same call then continues it."""

    run: str
    trained: tuple[str, ...]
    nothing_to_learn: tuple[str, ...]
    up_to_date: int
    iterations: int
    finished: bool


def train_population(
    base: Base,
    pipeline: UserPipeline,
    config: TrainConfig,
    *,
    directory: Path,
    catalog: Catalog,
    users: Sequence[str] | None = None,
    everyone: bool = False,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    on_start: Callable[[RunRecord, Seating], None] = lambda record, seating: None,
    on_round: Callable[[Seating, list[StepMetrics]], None] = lambda seating, metrics: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> RunReport:
    """Train these users (default: all in the dataset) and commit a revision for each.

    Users whose latest revision already covers their data are left out, unless `everyone`. `directory` holds the run's
    record and checkpoints: called again with the same arguments after any kind of stop, the run goes on from the
    latest checkpoint and ends as if it had never stopped. on_start is told where it begins, before the first step.

    One kind of adapter, `config.adapter`: `Session.by_cohort` is what makes several of a config with `cohorts`.

    mesh: where the population lies, and on which the base was loaded; None is one device. Its axis `population` divides
    config.slots. A run may go on over another mesh, of other processes. Several processes call this together, each with
    the same arguments, and see the same files.
    """
    dataset = pipeline.dataset
    names = list(dataset.users()) if users is None else list(users)
    names = [user for user in names if dataset.num_examples(user) >= config.min_examples]
    if not names:
        raise DataError(f"no users to train: nobody has min_examples={config.min_examples} examples")
    cohort = Cohort.of(config.adapter, base.model.sites())
    placement, group = Placement(config.slots, mesh, rules or base.model.rules), ProcessGroup.current()
    turns = Turns(placement, config.turns)
    record = group.leader_first(
        lambda: RunRecord.open(
            directory,
            run_settings(base, pipeline, config),
            lambda: names if everyone else users_with_new_data(dataset, catalog, names, base.digest, config.adapter),
        )
    )
    files = RunFiles(
        base=base,
        cohort=cohort,
        config=config,
        dataset=dataset,
        catalog=catalog,
        directory=directory,
        run=record.run,
        turns=turns,
    )

    def steps_of(user: str) -> int:
        rows = pipeline.rows(user, "past").tokens_BxT.shape[0]
        return config.steps_for(rows, pipeline.config.batch_size)

    source = MemberSource(cohort, config, steps_of=steps_of, catalog=catalog, base_digest=base.digest, run=record.run)
    writer = RevisionWriter(files.commit, publish=files.publish)
    stream = PopulationStream(
        base=base.params,
        shared=files.shared,
        cohort=cohort,
        config=config,
        programs=compile_programs(base.model, cohort, config, placement),
        data=pipeline,
        queue=record.queue,
        source=source,
        writer=writer,
        turns=turns,
        hooks=Hooks(on_round=on_round, save=files.save, stop_requested=stop_requested),
    )
    try:
        fresh = stream.fresh()
        continued = files.restore(fresh)
        on_start(record, continued or fresh)
        del fresh  # its buffers, as large as the population's
        end = stream.run(continued)
    finally:
        source.close()
        writer.close()
        files.close()
    seated = {user for user in end.table.users if user is not None}
    left = [user for user in record.queue[: end.table.next] if user not in seated]
    # Each process looks at a part of them: it means reading their text.
    own = [user for user in left[group.index :: group.count] if steps_of(user) == 0]
    found = {user for part in group.gather(own) for user in part}
    idle = tuple(user for user in left if user in found)
    return RunReport(
        run=record.run,
        trained=tuple(user for user in left if user not in idle),
        nothing_to_learn=idle,
        up_to_date=len(names) - len(record.queue),
        iterations=end.iteration,
        finished=not seated and end.table.next == len(record.queue),
    )


def run_settings(base: Base, pipeline: UserPipeline, config: TrainConfig) -> dict[str, Any]:
    """What decides a run's result, as JSON values; the optimizer with its settings, the schedule by its name only."""
    plain = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name != "cohorts"}
    for name in ("optimizer", "schedule"):
        plain[name] = _described(plain[name])
    plain["adapter"] = config.adapter.to_dict()
    plain["early_stop"] = dataclasses.asdict(config.early_stop) if config.early_stop else None
    return {"base": base.digest, "data": dataclasses.asdict(pipeline.config), **plain}


def _described(function: Callable[..., Any]) -> Any:
    if isinstance(function, functools.partial):
        return {"name": _described(function.func), **function.keywords}
    return getattr(function, "__qualname__", None) or type(function).__name__
