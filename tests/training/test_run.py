"""A queue of users through fewer slots: everyone is trained, as if alone, whatever stops the run in between."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from popax.adapters.base import ALL_LINEAR, AdapterConfig
from popax.adapters.table import METHODS
from popax.data.pipeline import PipelineConfig, UserPipeline
from popax.data.records import Example
from popax.data.tokenize import load_tokenizer
from popax.data.users import UserDataset
from popax.errors import ConfigError, DataError, StorageError
from popax.population.early_stop import EarlyStop
from popax.population.optimizer import adamw
from popax.store.catalog import Catalog
from popax.training.run import train_population
from tests.training.conftest import SOME_SITES


def contents(catalog: Catalog) -> dict[str, list[tuple]]:
    """Every user's revisions: numbers, digests and counters."""
    return {
        record.user: [(m.revision, m.digest, tuple(sorted(m.metrics.items()))) for m in catalog.history(record.user)]
        for record in catalog.list()
    }


def train(base, pipeline, config, place, **options):
    with_catalog = Catalog.open(place / "catalog", create=True)
    return with_catalog, train_population(
        base, pipeline, config, directory=place / "run", catalog=with_catalog, **options
    )


# The step is every method's in tests/population; a run adds the catalog, and what a row of each form asks of it. The
# plain one, the one tied over sites and the one of no linear map are the quick ones.
SLOW_FORMS = [pytest.param(name, marks=pytest.mark.slow) for name in ("dora", "lora_xs", "reft", "delta_mem")]


@pytest.mark.parametrize("method", ["lora", "tiny_lora", "prompt", *SLOW_FORMS])
def test_everyone_is_trained_as_if_alone(base, pipeline_of, train_config, tmp_path, method):
    pipeline = pipeline_of(7)
    # Where a gradient is rounding alone, eps = 1e-8 makes a step of the learning rate of it.
    targets = SOME_SITES if METHODS[method].kind == "linear" else ALL_LINEAR  # which stands for all of another kind
    adapter, optimizer = AdapterConfig(method=method, rank=2, init="default", targets=targets), adamw(eps=1e-6)
    config = train_config(adapter=adapter, optimizer=optimizer, slots=3)
    together, report = train(base, pipeline, config, tmp_path / "together")
    assert report.finished
    assert set(report.trained) == set(pipeline.dataset.users())
    # Alone: a population of one slot that meets the users one after the other.
    alone, _ = train(base, pipeline, dataclasses.replace(config, slots=1), tmp_path / "alone")
    moved = 0.0
    for user in pipeline.dataset.users():
        (mine, manifest), (other, single) = together.load(user), alone.load(user)
        assert manifest.metrics["steps"] == single.metrics["steps"]
        assert manifest.metrics["kept_step"] == single.metrics["kept_step"]
        # Invariant 1 is 1e-6 a few steps (tests/population); what is left of it after a run of Adam's.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), mine, other)
        moved += sum(float(np.abs(leaf).sum()) for site in mine.values() for name, leaf in site.items() if name != "a")
    assert moved > 0, "nothing was trained"


def test_a_round_ends_when_all_its_members_are_done(base, pipeline_of, train_config, tmp_path):
    """Eight users of one step in four slots: two iterations, however far apart validations are."""
    rounds = []
    config = train_config(slots=4, steps=1, early_stop=EarlyStop(every=10))
    _, report = train(
        base, pipeline_of(8), config, tmp_path, on_round=lambda seating, metrics: rounds.append(len(metrics))
    )
    assert report.finished
    assert rounds == [1, 1]
    assert report.iterations == 2


def test_nobody_is_tokenised_at_each_step(base, pipeline_of, train_config, tmp_path, monkeypatch):
    """More seats than `cached_users`: everyone's text was encoded anew for each batch."""
    small = pipeline_of(6)
    small = UserPipeline(small.dataset, small.tokenizer, dataclasses.replace(small.config, cached_users=2))
    read, encode = [], UserPipeline._read_user
    monkeypatch.setattr(UserPipeline, "_read_user", lambda self, user: read.append(user) or encode(self, user))
    train(base, small, train_config(slots=3, turns=2), tmp_path)
    assert sorted(read) == small.dataset.users()


@pytest.mark.slow
@pytest.mark.parametrize("turns", [1, 2])
def test_invariant_1_and_6_with_micro_batches(base, pipeline_of, train_config, tmp_path, turns):
    """Two micro-batches of one row a step are a step of two rows, whoever trains beside; stopped and resumed too."""
    config = train_config(slots=2, turns=turns, optimizer=adamw(eps=1e-6))
    whole = pipeline_of(5)
    half = UserPipeline(whole.dataset, whole.tokenizer, dataclasses.replace(whole.config, batch_size=1))
    at_once, _ = train(base, whole, config, tmp_path / "at_once")
    config, finished = dataclasses.replace(config, accumulate=2), False
    while not finished:
        in_parts, report = train(base, half, config, tmp_path / "in_parts", stop_requested=lambda: True)
        finished = report.finished
    for user in whole.dataset.users():
        (one, manifest), (other, again) = at_once.load(user), in_parts.load(user)
        assert manifest.metrics["steps"] == again.metrics["steps"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, other)


@pytest.mark.slow
def test_invariant_6_stopping_at_every_round_changes_nothing(base, pipeline_of, train_config, tmp_path):
    pipeline, config = pipeline_of(5), train_config(slots=3)
    straight, _ = train(base, pipeline, config, tmp_path / "straight")
    finished, starts = False, 0
    while not finished:
        starts += 1
        interrupted, report = train(base, pipeline, config, tmp_path / "stopped", stop_requested=lambda: True)
        finished = report.finished
    assert starts > 2
    assert contents(interrupted) == contents(straight)


@pytest.mark.slow
def test_users_who_wait_in_host_memory_are_trained_to_the_same_bytes(base, pipeline_of, train_config, tmp_path):
    """Seven users by turns of two slots, stopped once on the way, against two slots that each user keeps."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("population",))
    base = dataclasses.replace(base, params=jax.device_put(base.params, NamedSharding(mesh, PartitionSpec())))
    pipeline, config = pipeline_of(7), train_config(slots=2)
    straight, _ = train(base, pipeline, config, tmp_path / "straight", mesh=mesh)
    config, seated = dataclasses.replace(config, turns=3), []

    def look(seating, metrics):
        seated.append(len(seating.table.occupied))
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(seating.states)} == {"pinned_host"}

    finished = False
    while not finished:
        options = {"mesh": mesh, "stop_requested": lambda: len(seated) == 2, "on_round": look}
        by_turns, report = train(base, pipeline, config, tmp_path / "turns", **options)
        finished = report.finished
    assert max(seated) == 6
    assert contents(by_turns) == contents(straight)


def test_invariant_7_a_stream_compiles_each_program_once(base, pipeline_of, train_config, tmp_path, monkeypatch):
    from popax.training import run as run_module

    jax.clear_caches()  # jit shares the programs of other tests
    made = []
    compile_programs = run_module.compile_programs
    monkeypatch.setattr(run_module, "compile_programs", lambda *a: made.append(compile_programs(*a)) or made[-1])
    train(base, pipeline_of(9), train_config(slots=3), tmp_path)
    assert {name: program._cache_size() for name, program in made[0]._asdict().items()} == dict.fromkeys(
        made[0]._fields, 1
    )


def test_only_users_with_new_data_are_trained_again(base, pipeline_of, train_config, tmp_path):
    pipeline, config = pipeline_of(3), train_config(slots=2)
    catalog, _ = train(base, pipeline, config, tmp_path)
    before = contents(catalog)
    with pytest.raises(ConfigError, match="other settings"):
        train(base, pipeline, train_config(slots=2, steps=8), tmp_path)
    again = train_population(base, pipeline, config, directory=tmp_path / "second", catalog=catalog)
    assert again.trained == ()
    assert again.up_to_date == 3
    assert contents(catalog) == before
    more = {user: [e.text for e in pipeline.dataset.examples(user)] for user in pipeline.dataset.users()}
    more["user-001"].append("something new " * 3)
    grown = UserPipeline(UserDataset.from_examples(more), pipeline.tokenizer, pipeline.config)
    third = train_population(base, grown, config, directory=tmp_path / "third", catalog=catalog)
    assert third.trained == ("user-001",)
    latest = catalog.history("user-001")[-1]
    assert (latest.revision, latest.parent) == (2, 1)
    assert latest.provenance["data"]["examples"] == 8


TURNS_ENDED = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"


def test_a_user_with_nothing_to_learn_from_gets_no_revision(base, train_config, tmp_path):
    """Nobody answers in this user's conversations, and so no token carries loss. Their seat is the next one's."""
    load_tokenizer("byte").save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TURNS_ENDED}))
    unanswered = Example(user="silent", messages=({"role": "user", "content": "hello?"},))
    dataset = UserDataset.from_examples({"silent": [unanswered] * 3, "speaks": ["hello there"] * 4})
    pipeline = UserPipeline(dataset, load_tokenizer(tmp_path), PipelineConfig(seq_len=16, batch_size=2))
    assert len(pipeline.rows("silent", "past").tokens_BxT) == 0
    catalog, report = train(base, pipeline, train_config(slots=1), tmp_path)
    assert report.finished
    assert (report.trained, report.nothing_to_learn) == (("speaks",), ("silent",))
    assert not catalog.exists("silent")
    assert [manifest.metrics["steps"] for manifest in catalog.history("speaks")] == [6]


def test_who_has_too_few_examples_is_left_out(base, pipeline_of, train_config, tmp_path):
    with pytest.raises(DataError, match="min_examples=99"):
        train(base, pipeline_of(2), train_config(slots=2, min_examples=99), tmp_path)


@pytest.mark.slow
def test_a_failed_write_stops_the_run_and_nothing_is_lost(base, pipeline_of, train_config, tmp_path, monkeypatch):
    pipeline, config = pipeline_of(5), train_config(slots=2)
    straight, _ = train(base, pipeline, config, tmp_path / "straight")
    full = [False, True]

    def commit(self, cohort, commits, original=Catalog.commit_batch):
        if full and full.pop(0):
            raise StorageError("no space left on the device")
        return original(self, cohort, commits)

    monkeypatch.setattr(Catalog, "commit_batch", commit)
    with pytest.raises(StorageError, match="no space"):
        train(base, pipeline, config, tmp_path / "full")
    resumed, report = train(base, pipeline, config, tmp_path / "full")
    assert report.finished
    assert contents(resumed) == contents(straight)
