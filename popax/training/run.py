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
from popax.population.described import described
from popax.population.placement import Placement
from popax.population.step import StepMetrics
from popax.population.turns import Turns
from popax.sharding import ShardingRules
from popax.store.catalog import Catalog
from popax.training.compiled import compile_programs
from popax.training.config import TrainConfig
from popax.training.files import RunFiles
from popax.training.members import MemberSource, RevisionWriter
from popax.training.news import DataIdentity, users_with_new_data
from popax.training.record import RunRecord
from popax.training.report import Listing, RunReport, finish_round, report_of
from popax.training.rounds import Identity, open_round
from popax.training.stream import Hooks, PopulationStream, Seating


def train_population(
    base: Base,
    pipeline: UserPipeline,
    config: TrainConfig,
    *,
    directory: Path,
    catalog: Catalog,
    users: Sequence[str] | None = None,
    everyone: bool = False,
    close_stopped: bool = False,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    on_start: Callable[[RunRecord, Seating], None] = lambda record, seating: None,
    on_round: Callable[[Seating, list[StepMetrics]], None] = lambda seating, metrics: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> RunReport:
    """Train these users (default: all in the dataset) and commit a revision for each.

    Users whose latest revision already covers their data are left out, unless `everyone`. `directory` holds the run's
    record and checkpoints: called again with the same arguments after any kind of stop, the run goes on from the
    latest checkpoint and ends as if it had never stopped. Called again once it has finished, with more data, a new
    round trains who has something new from their latest revisions; with nothing new nothing is done. A stopped round
    is resumed with the data and the tokenizer it began with, or refused (ConfigError); close_stopped closes it and
    begins a new one. on_start is told where a round begins, before the first step.

    A user whose text or revision cannot be used is set aside and reported, and the others are trained. Raises
    PopulationError where that is everybody in a first round: then it is the run that is wrong.

    One kind of adapter, `config.adapter`: `Session.by_cohort` is what makes several of a config with `cohorts`.

    mesh: where the population lies, and on which the base was loaded; None is one device. Its axis `population` divides
    config.slots. A run may go on over another mesh, of other processes. Several processes call this together, each with
    the same arguments, and see the same files.
    """
    # Those with a seat, and those who are read ahead for the next ones.
    pipeline = pipeline.for_users(config.slots * (config.turns + 1))
    dataset, group = pipeline.dataset, ProcessGroup.current()
    listing = Listing.of(dataset, users, config.min_examples)
    if not listing.names:
        raise DataError(f"no users to train: nobody has min_examples={config.min_examples} examples")
    # What the configuration cannot do is told before anything is written.
    cohort = Cohort.of(config.adapter, base.model.sites())
    placement = Placement(config.slots, mesh, rules or base.model.rules)
    turns, programs = Turns(placement, config.turns), compile_programs(base.model, cohort, config, placement)
    identity = Identity(
        settings=run_settings(base, pipeline, config),
        tokenizer=pipeline.tokenizer.digest,
        data=DataIdentity.of(dataset, listing.names),
    )
    with_news = functools.partial(users_with_new_data, dataset, catalog, listing.names, base.digest, config.adapter)
    news = (lambda left: list(listing.names)) if everyone else with_news
    opened = group.leader_first(
        # What process 0 closed is not there to be closed by the others.
        lambda: open_round(directory, identity, catalog, news, close=close_stopped and group.leads)
    )
    record = opened.record
    if not opened.news:
        return report_of(opened, listing, catalog, end=None)
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
        programs=programs,
        data=pipeline,
        queue=record.queue,
        source=source,
        writer=writer,
        turns=turns,
        hooks=Hooks(on_round=on_round, refused=files.refused, save=files.save, stop_requested=stop_requested),
        begins=record.begins,
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
    if not end.table.occupied and end.table.next == len(record.queue):
        finish = functools.partial(finish_round, directory, record, end, dataset, catalog)
        record = group.leader_first(lambda: finish() if group.leads else RunRecord.read(directory) or record)
    return report_of(opened._replace(record=record), listing, catalog, end=end)


def run_settings(base: Base, pipeline: UserPipeline, config: TrainConfig) -> dict[str, Any]:
    """What decides a run's result, as JSON values."""
    plain = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name != "cohorts"}
    for name in ("optimizer", "schedule"):
        plain[name] = described(plain[name])
    if not isinstance(plain["objective"], str):
        plain["objective"] = described(plain["objective"])
    plain["learning_rate"] = config.rate
    plain["adapter"] = config.adapter.to_dict()
    plain["early_stop"] = dataclasses.asdict(config.early_stop) if config.early_stop else None
    return {"base": base.digest, "data": dataclasses.asdict(pipeline.config), **plain}
