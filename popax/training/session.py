"""A population run as one object: the training, then the shared adapter and the table that compares."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from popax.adapters.cohort import Cohort
from popax.data.pipeline import UserPipeline
from popax.distributed.group import ProcessGroup
from popax.errors import DataError
from popax.evaluation.catalog import EVERYONE, catalog_columns
from popax.evaluation.columns import EvalConfig, UserScores
from popax.modeling.base import Base
from popax.population.placement import Placement
from popax.store.catalog import Catalog
from popax.store.layout import RowLayout
from popax.store.manifest import Manifest
from popax.training.compiled import compile_programs
from popax.training.config import TrainConfig
from popax.training.console import PopulationWatch, Unwatched, step_bar
from popax.training.files import shared_arrays
from popax.training.news import latest_manifests, together_provenance
from popax.training.record import RunRecord
from popax.training.report import RunReport
from popax.training.run import train_population
from popax.training.shared_adapter import train_shared_adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """What a population run is made of; directory also receives its metrics and the shared adapter's catalog."""

    base: Base
    pipeline: UserPipeline
    config: TrainConfig
    evaluation: EvalConfig
    catalog: Catalog
    users: Sequence[str]
    directory: Path
    mesh: Mesh | None = None

    def by_cohort(self) -> tuple[list["Session"], list[str]]:
        """(a session for each rule of `config.cohorts` that has users, who stay with the base alone).

        They share the base, the text and the catalog, and each has a folder of its own in this one's. Without rules it
        is this session. Raises DataError for users whom no rule matches.
        """
        rules = self.config.cohorts
        if not rules:
            return [self], []
        owner = {user: next((at for at, rule in enumerate(rules) if rule.has(user)), None) for user in self.users}
        left = [user for user, at in owner.items() if at is None]
        if left:
            some = ", ".join(map(repr, left[:3]))
            raise DataError(
                f"{len(left)} users match no rule of TrainConfig.cohorts ({some}, ...): end with one for '.*', whose "
                "adapter may be None"
            )
        sessions, alone, counts = [], [], self.pipeline.dataset.counts()
        for at, rule in enumerate(rules):
            own = [user for user in self.users if owner[user] == at]
            if rule.adapter is None:
                alone += own
            elif any(counts.get(user, 0) >= self.config.min_examples for user in own):
                rate = self.config.learning_rate if rule.learning_rate is None else rule.learning_rate
                config = dataclasses.replace(self.config, adapter=rule.adapter, learning_rate=rate, cohorts=())
                place = self.directory / f"cohort-{at}"
                sessions.append(dataclasses.replace(self, config=config, users=own, directory=place))
        if not sessions and not alone:
            raise DataError(f"no users to train: nobody has min_examples={self.config.min_examples} examples")
        return sessions, alone

    def check(self) -> None:
        """Raises ConfigError, SiteError or PopulationError where the configuration cannot be trained on this base."""
        cohort = Cohort.of(self.config.adapter, self.base.model.sites())
        placement = Placement(self.config.slots, self.mesh, self.base.model.rules)
        compile_programs(self.base.model, cohort, self.config, placement)

    def train(
        self,
        *,
        everyone: bool,
        save_config: Callable[[], object],
        stop_requested: Callable[[], bool],
        close_stopped: bool = False,
    ) -> RunReport:
        """`train_population`, shown and recorded by a PopulationWatch, by process 0 alone where there are several."""
        shows = ProcessGroup.current().leads
        with PopulationWatch(self.directory, save_config=save_config) if shows else Unwatched() as watch:
            return train_population(
                self.base,
                self.pipeline,
                self.config,
                directory=self.directory,
                catalog=self.catalog,
                users=self.users,
                everyone=everyone,
                close_stopped=close_stopped,
                mesh=self.mesh,
                on_start=watch.on_start,
                on_round=watch.on_round,
                stop_requested=stop_requested,
            )

    def compare(self) -> list[UserScores]:
        """The four columns for the users of the latest round; [] below two users, and where its table was made before
        and nothing has been trained since."""
        record = RunRecord.read(self.directory)
        if record is None or record.tabled:
            return []
        meant = [user for user in record.queue if user not in record.left]
        users = users_of_cohort(self.base, self.config, self.catalog, meant)
        scores = []
        if len(users) >= 2:
            with step_bar("shared adapter") as tell:
                everyone = keep_shared_adapter(self, users, record.run, on_step=tell)
            scores = score(self.base, self.pipeline, self.catalog, users, self.evaluation, everyone)
        return scores

    def tabled(self) -> None:
        """The table of the latest round has been shown."""
        if (record := RunRecord.read(self.directory)) is not None:
            record.replace(tabled=True).write(self.directory)


def score(
    base: Base,
    pipeline: UserPipeline,
    catalog: Catalog,
    users: Sequence[str],
    config: EvalConfig,
    everyone: Catalog | None,
) -> list[UserScores]:
    """`catalog_columns` with a bar."""
    with contextlib.ExitStack() as opened:
        tell = opened.enter_context(step_bar("score", unit="user"))
        done, total = 0, len(users) * (4 if everyone is not None else 3)

        def on_group(count: int) -> None:
            nonlocal done
            done += count
            tell(min(done, total), total)

        return catalog_columns(base, pipeline, catalog, users, config, everyone=everyone, on_group=on_group)


def users_of_cohort(base: Base, config: TrainConfig, catalog: Catalog, users: Sequence[str]) -> list[str]:
    """Those of these users whose latest revision is of this base and this adapter configuration."""
    cohort = Cohort.of(config.adapter, base.model.sites())
    stored = catalog.find_cohort(config.adapter, base.digest, RowLayout.of(cohort.abstract()))
    found = zip(users, latest_manifests(catalog, users), strict=True)
    return [user for user, one in found if stored is not None and isinstance(one, Manifest) and one.cohort == stored.id]


def keep_shared_adapter(
    session: Session, users: Sequence[str], run: str, *, on_step: Callable[[int, int], None]
) -> Catalog:
    """`train_shared_adapter`, committed as the user "everyone" of the catalog `shared` in the run's directory.

    It is no user of the run's own catalog, where it would be listed and counted among them. Trained once a run.
    """
    base, pipeline, config = session.base, session.pipeline, session.config
    learners = [user for user in users if len(pipeline.rows(user, "past").tokens_BxT)]
    if not learners:
        raise DataError(f"none of the {len(users)} users has text in the past to train a shared adapter on")
    kept = Catalog.open(session.directory / "shared", create=True)
    if kept.exists(EVERYONE) and kept.history(EVERYONE)[-1].run == run:
        return kept
    cohort = Cohort.of(config.adapter, base.model.sites())
    shared = shared_arrays(base, cohort, session.catalog)
    adapters = train_shared_adapter(base, pipeline, config, learners, shared, on_step=on_step)
    layout = RowLayout.of(cohort.abstract())
    stored = kept.cohort(config.adapter, cohort.specs, base.digest, layout, shared or None)
    adapter = jax.tree.map(lambda leaf: np.asarray(leaf[0]), adapters)
    provenance = {"data": together_provenance(pipeline.dataset, learners), "seed": config.seed}
    kept.commit(stored, EVERYONE, adapter, provenance=provenance, hparams=config.recorded_settings(), run=run)
    return kept
