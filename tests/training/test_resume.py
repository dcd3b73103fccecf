"""Training that goes on exactly: two runs with the optimizer's state kept between them give the bytes of one."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from popax.adapters.base import AdapterConfig
from popax.errors import PopulationError
from popax.population.early_stop import EarlyStop
from popax.population.optimizer import adamw, constant, lion, sgd, warmup_constant
from popax.store.catalog import Catalog
from popax.training.run import train_population
from tests.training.conftest import SOME_SITES

OPTIMIZERS = {"adamw": adamw(weight_decay=0.1), "lion": lion(), "momentum": sgd(momentum=0.9)}


def rows(catalog, users, revision=None):
    return {manifest.user: manifest.digest for manifest in catalog.resolve([(user, revision) for user in users])}


def runs(base, pipeline, place, *configs, **options):
    """One catalog, trained by each of these runs in turn."""
    catalog = Catalog.open(place / "catalog", create=True)
    for index, config in enumerate(configs):
        folder = place / f"run-{index}"
        train_population(base, pipeline, config, directory=folder, catalog=catalog, everyone=True, **options)
    return catalog


@pytest.fixture
def kept(train_config):
    def make(**changes):
        own = {"early_stop": None, "schedule": warmup_constant(warmup_steps=3), "save_optimizer_state": True}
        return train_config(**{**own, **changes})

    return make


# lion's state is one tree, as momentum's is.
@pytest.mark.parametrize("name", ["adamw", "momentum", pytest.param("lion", marks=pytest.mark.slow)])
def test_two_runs_of_three_steps_are_one_of_six(base, pipeline_of, kept, tmp_path, name):
    """With dropout, whose key is the member's own, and users who change slots between the runs, of another seed."""
    pipeline, adapter = pipeline_of(5), AdapterConfig(rank=2, dropout=0.3, targets=SOME_SITES)
    config = kept(optimizer=OPTIMIZERS[name], adapter=adapter, slots=5, steps=6)
    straight = runs(base, pipeline, tmp_path / "straight", config)
    first = dataclasses.replace(config, steps=3)
    users = pipeline.dataset.users()
    parted = runs(base, pipeline, tmp_path / "parted", first)
    second = dataclasses.replace(first, seed=7)
    again = {"directory": tmp_path / "again", "catalog": parted, "users": users[::-1], "everyone": True}
    train_population(base, pipeline, second, **again)
    assert rows(parted, users) == rows(straight, users)
    for user in users:
        found = [(catalog, catalog.load(user)[1]) for catalog in (straight, parted)]
        assert [manifest.metrics["steps"] for _, manifest in found] == [6, 6]
        states = [catalog.load_optimizer(manifest) for catalog, manifest in found]
        jax.tree.map(lambda mine, theirs: np.testing.assert_array_equal(mine, theirs, strict=True), *states)
    # The same without the state is another adapter: the test could fail.
    forgot = dataclasses.replace(first, save_optimizer_state=False)
    assert rows(runs(base, pipeline, tmp_path / "forgot", forgot, forgot), users) != rows(straight, users)


def test_the_state_kept_is_that_of_the_adapter_kept(base, pipeline_of, kept, tmp_path):
    """Early stopping keeps an earlier adapter: its state is that of a run which ended there."""
    pipeline = pipeline_of(4)
    config = kept(early_stop=EarlyStop(every=2, patience=1), schedule=constant(), learning_rate=0.05, steps=12)
    stopped = runs(base, pipeline, tmp_path / "stopped", config)
    early = 0
    for user in pipeline.dataset.users():
        [manifest] = stopped.history(user)
        kept_step = manifest.metrics["kept_step"]
        early += 0 < kept_step < manifest.metrics["steps"]
        if not kept_step:
            continue
        short = dataclasses.replace(config, early_stop=None, steps=kept_step)
        alone = runs(base, pipeline, tmp_path / f"short-{user}", short, users=[user])
        state, wanted = stopped.load_optimizer(manifest), alone.load_optimizer(alone.load(user)[1])
        assert state["step"] == kept_step
        jax.tree.map(lambda mine, theirs: np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-7), state, wanted)
    assert early, "nobody was stopped after having learnt something: the test shows nothing"


def test_another_optimizer_is_refused_by_name(base, pipeline_of, kept, tmp_path):
    first, second = kept(steps=2), kept(steps=2, optimizer=lion())
    with pytest.raises(PopulationError, match=r"'user-000'@1: the optimizer's state that was kept is of another"):
        runs(base, pipeline_of(1), tmp_path, first, second)


def test_a_revision_without_a_state_is_continued_with_a_fresh_one(base, pipeline_of, kept, tmp_path):
    catalog = runs(base, pipeline_of(1), tmp_path, kept(steps=2, save_optimizer_state=False), kept(steps=2))
    assert [manifest.metrics["steps"] for manifest in catalog.history("user-000")] == [2, 2]
    assert [manifest.optimizer is None for manifest in catalog.history("user-000")] == [True, False]


@pytest.mark.slow
def test_invariant_6_stopping_in_the_second_run_changes_nothing(base, pipeline_of, kept, tmp_path):
    """Also over a mesh, where each block of the population has its own members."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("population",))
    base = dataclasses.replace(base, params=jax.device_put(base.params, NamedSharding(mesh, PartitionSpec())))
    pipeline, config = pipeline_of(3), kept(steps=4, slots=2, early_stop=EarlyStop(every=2, patience=2))
    straight = runs(base, pipeline, tmp_path / "straight", config, config, mesh=mesh)
    catalog = runs(base, pipeline, tmp_path / "stopped", config, mesh=mesh)
    finished, starts = False, 0
    while not finished:
        starts += 1
        folder, stop = tmp_path / "stopped" / "again", {"stop_requested": lambda: True, "mesh": mesh}
        finished = train_population(
            base, pipeline, config, directory=folder, catalog=catalog, everyone=True, **stop
        ).finished
    assert starts > 2
    assert rows(catalog, pipeline.dataset.users()) == rows(straight, pipeline.dataset.users())
