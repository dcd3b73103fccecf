"""A run whose adapters are stored in few bits, one that meets steps it cannot take, and what a run is refused for."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from popax.adapters.base import AdapterConfig
from popax.adapters.table import METHODS
from popax.data.pipeline import UserPipeline
from popax.errors import ConfigError
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.objectives.base import mean_of
from popax.objectives.sft import sft
from popax.population.early_stop import EarlyStop
from popax.population.optimizer import constant, warmup_constant, warmup_cosine
from popax.store.catalog import Catalog
from popax.store.extract import extract_user
from popax.training.config import CohortRule, TrainConfig
from popax.training.console import PopulationWatch, round_metrics
from popax.training.inputs import check_fits
from popax.training.metrics import read_metrics
from popax.training.pretrain import PretrainConfig, PretrainHooks, pretrain
from popax.training.run import run_settings, train_population
from popax.types import NO_ADAPT


def contents(catalog):
    return {
        record.user: [(m.revision, m.digest, tuple(sorted(m.metrics.items()))) for m in catalog.history(record.user)]
        for record in catalog.list()
    }


def run(base, pipeline, config, place, **options):
    catalog = Catalog.open(place / "catalog", create=True)
    return catalog, train_population(base, pipeline, config, directory=place / "run", catalog=catalog, **options)


def stopped_everywhere(base, pipeline, config, place):
    """(the catalog of a run that was stopped after each of its rounds, how often it began)."""
    finished, starts = False, 0
    while not finished:
        starts += 1
        catalog, report = run(base, pipeline, config, place, stop_requested=lambda: True)
        finished = report.finished
    return catalog, starts


def narrow(train_config, dtype="bfloat16", **changes):
    return train_config(adapter=AdapterConfig(rank=2, dtype=dtype), slots=3, **changes)


def test_masters_survive_a_stop_and_users_keep_what_is_stored(base, pipeline_of, train_config, tmp_path):
    """Stopped at each round, members by turns in host memory: the same bytes, in the dtype that was asked for."""
    pipeline, config = pipeline_of(5), narrow(train_config, turns=2, steps=4, learning_rate=1e-3)
    straight, _ = run(base, pipeline, config, tmp_path / "straight")
    _, report = run(base, pipeline, config, tmp_path / "stopped", stop_requested=lambda: True)
    assert not report.finished
    # What `popax extract` reads of the checkpoint is what the user would keep, as it would be stored.
    found = extract_user(tmp_path / "stopped" / "run" / "checkpoints", "user-000")
    assert {leaf.dtype for leaf in jax.tree.leaves(found.adapter)} == {np.dtype(ml_dtypes.bfloat16)}
    assert any(np.asarray(leaf, np.float32).any() for leaf in jax.tree.leaves(found.adapter))
    again, _ = stopped_everywhere(base, pipeline, config, tmp_path / "stopped")
    assert contents(again) == contents(straight)
    adapter, _ = straight.load("user-000")
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.slow
def test_invariant_6_twenty_stops_change_no_bit_of_float16_adapters(base, pipeline_of, train_config, tmp_path):
    pipeline = pipeline_of(14)
    config = narrow(
        train_config, "float16", save_optimizer_state=True, steps=6, early_stop=EarlyStop(every=1, patience=3)
    )
    straight, _ = run(base, pipeline, config, tmp_path / "straight")
    again, starts = stopped_everywhere(base, pipeline, config, tmp_path / "stopped")
    assert starts > 20
    assert contents(again) == contents(straight)
    for user in pipeline.dataset.users():
        states = [catalog.load_optimizer(catalog.load(user)[1]) for catalog in (straight, again)]
        jax.tree.map(lambda mine, theirs: np.testing.assert_array_equal(mine, theirs, strict=True), *states)


def test_two_runs_are_one_whatever_is_stored(base, pipeline_of, train_config, tmp_path):
    """The masters are kept with the optimizer's state: what is stored of them would not be enough."""
    own = {"early_stop": None, "schedule": warmup_constant(warmup_steps=3), "save_optimizer_state": True}
    pipeline, config = pipeline_of(3), narrow(train_config, **own)
    straight, _ = run(base, pipeline, config, tmp_path / "straight")
    first = dataclasses.replace(config, steps=3)
    parted, _ = run(base, pipeline, first, tmp_path / "parted")
    again = {"directory": tmp_path / "again", "catalog": parted, "everyone": True}
    train_population(base, pipeline, first, **again)
    for user in pipeline.dataset.users():
        found = [catalog.load(user)[1] for catalog in (straight, parted)]
        assert found[0].digest == found[1].digest
        assert [one.metrics["steps"] for one in found] == [6, 6]
        states = [catalog.load_optimizer(one) for catalog, one in zip((straight, parted), found, strict=True)]
        jax.tree.map(lambda mine, theirs: np.testing.assert_array_equal(mine, theirs, strict=True), *states)


def test_a_state_that_was_kept_in_few_bits_goes_on(base, pipeline_of, train_config, tmp_path):
    """As it was written before there were masters: moments of the adapter's own dtype, and none beside them."""
    pipeline = pipeline_of(1)
    config = narrow(train_config, early_stop=None, schedule=constant(), save_optimizer_state=True, steps=2)
    catalog, _ = run(base, pipeline, config, tmp_path)
    adapter, manifest = catalog.load("user-000")
    state = catalog.load_optimizer(manifest)
    state.pop("masters", None)
    older = {
        name: leaf.astype(ml_dtypes.bfloat16) if leaf.dtype == np.float32 else leaf
        for name, leaf in state["optimizer"].items()
    }
    catalog.commit(
        catalog.cohort_of(manifest), "user-000", adapter, optimizer=state | {"optimizer": older}, run="older"
    )
    train_population(base, pipeline, config, directory=tmp_path / "again", catalog=catalog, everyone=True)
    assert catalog.load("user-000")[1].metrics["steps"] == 4


def test_skipped_steps_are_seen(base, pipeline_of, train_config, tmp_path, capsys):
    """An update of NaN on the third step of each: on the console, in metrics.jsonl and in the manifest."""

    def poisoned(own):
        adam = optax.adam(own.learning_rate)

        def update(updates, state, params=None):
            updates, state = adam.update(updates, state, params)
            return jax.tree.map(lambda leaf: jnp.where(state[0].count == 3, jnp.nan, leaf), updates), state

        return optax.GradientTransformation(adam.init, update)

    pipeline, config = pipeline_of(2), train_config(optimizer=poisoned, slots=2, steps=4, early_stop=None)
    rounds = []
    with PopulationWatch(tmp_path, save_config=lambda: None) as watch:

        def on_round(seating, metrics):
            watch.on_round(seating, metrics)
            rounds.append(round_metrics(metrics))

        catalog, _ = run(base, pipeline, config, tmp_path, on_start=watch.on_start, on_round=on_round)
    # The step after meets it again: the state stays where it was.
    for user in pipeline.dataset.users():
        adapter, manifest = catalog.load(user)
        assert manifest.metrics["skipped"] == 2
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(adapter))
    assert sum(one["skipped_steps"] for one in rounds) == 4
    assert sum(record["skipped_steps"] for record in read_metrics(tmp_path)) == 4
    assert "4 steps skipped" in capsys.readouterr().err


def test_a_schedule_is_recorded_with_its_arguments(base, pipeline_of, train_config, tmp_path):
    """A run that is called again with others is another run."""
    pipeline, config = pipeline_of(3), train_config(schedule=warmup_cosine(warmup_fraction=0.5), slots=1)
    settings = run_settings(base, pipeline, config)
    assert settings.get("schedule") == {"name": "warmup_cosine_factor", "warmup_fraction": 0.5, "floor": 0.0}
    _, report = run(base, pipeline, config, tmp_path, stop_requested=lambda: True)
    assert not report.finished
    for other in (warmup_cosine(warmup_fraction=0.25), warmup_cosine(warmup_fraction=0.5, floor=0.1)):
        with pytest.raises(ConfigError, match=r"other settings \(schedule\)"):
            run(base, pipeline, dataclasses.replace(config, schedule=other), tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_the_learning_rate_is_the_methods_own(base, pipeline_of, method):
    own = METHODS[method].learning_rate
    config = TrainConfig(adapter=AdapterConfig(method=method))
    assert float(config.member_settings(1).learning_rate) == pytest.approx(own)
    assert config.recorded_settings()["learning_rate"] == own
    assert run_settings(base, pipeline_of(1), config)["learning_rate"] == own
    assert dataclasses.replace(config, learning_rate=0.5).recorded_settings()["learning_rate"] == 0.5


def test_a_rule_without_a_rate_has_its_methods_own(base, pipeline_of, tmp_path):
    from popax.evaluation.columns import EvalConfig
    from popax.training.session import Session

    prompt, lora = AdapterConfig(method="prompt", rank=2), AdapterConfig(rank=2)
    rules = (CohortRule(users=".*0", adapter=prompt), CohortRule(adapter=lora, learning_rate=0.25))
    pipeline = pipeline_of(3)
    session = Session(
        base=base,
        pipeline=pipeline,
        config=TrainConfig(cohorts=rules),
        evaluation=EvalConfig(),
        catalog=Catalog.open(tmp_path / "catalog", create=True),
        users=pipeline.dataset.users(),
        directory=tmp_path,
    )
    rates = [one.config.recorded_settings()["learning_rate"] for one in session.by_cohort()[0]]
    assert rates == [METHODS["prompt"].learning_rate, 0.25]


def test_virtual_tokens_past_the_models_context_are_refused(base, pipeline_of, train_config, tmp_path):
    """Rows of 60 tokens and 5 virtual ones, of a model for 64."""
    few = pipeline_of(2)
    pipeline = UserPipeline(few.dataset, few.tokenizer, dataclasses.replace(few.config, seq_len=60))
    config = train_config(adapter=AdapterConfig(method="prompt", rank=5), steps=1, early_stop=None)
    with pytest.raises(ConfigError, match=r"rows of 60 tokens with 5 virtual ones .*max_seq_len=64.* rows to 59"):
        run(base, pipeline, config, tmp_path)
    with pytest.raises(ConfigError, match="5 virtual ones"):
        check_fits(base.model, few.tokenizer, 60, virtual_tokens=5)
    check_fits(base.model, few.tokenizer, 60, virtual_tokens=4)


MODEL = {
    "vocab_size": 32, "embed_dim": 16, "ffw_dim": 24, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8
}  # fmt: skip


def test_a_base_of_bfloat16_is_pretrained_as_one_of_float32(random_rows):
    """Small steps add up, a stopped run goes on bitwise, and the base is in its own dtype."""
    config = PretrainConfig(steps=120, warmup_steps=1, learning_rate=1e-4, weight_decay=0.0)

    def trained(dtype):
        losses = []
        hooks = PretrainHooks(on_step=lambda step, loss: losses.append(loss))
        model = Model(ModelConfig(**MODEL, param_dtype=dtype))
        params, _ = pretrain(model, lambda step: random_rows, config, hooks=hooks)
        loss = float(mean_of(sft(model))(params, NO_ADAPT, random_rows)[0])
        return losses[0] - loss, params

    (wide, _), (few, params) = trained("float32"), trained("bfloat16")
    assert abs(few - wide) < 0.02 * wide, f"the loss fell by {few}, with float32 parameters by {wide}"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


@pytest.mark.slow
def test_pretraining_in_bfloat16_goes_on_bitwise(random_rows, tmp_path):
    config, model = PretrainConfig(steps=4, warmup_steps=1), Model(ModelConfig(**MODEL, param_dtype="bfloat16"))
    straight, _ = pretrain(model, lambda step: random_rows, config)
    seen = []
    hooks = PretrainHooks(on_step=lambda step, loss: seen.append(step), stop_requested=lambda: len(seen) == 1)
    _, done = pretrain(model, lambda step: random_rows, config, directory=tmp_path, hooks=hooks)
    assert done < 4
    params, _ = pretrain(model, lambda step: random_rows, config, directory=tmp_path)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), params, straight)


def test_a_pretraining_step_that_is_not_finite_changes_nothing(random_rows):
    """The weights of the loss are inf at one step: the base is as if it had not been."""
    config, model = PretrainConfig(steps=2, warmup_steps=1), Model(ModelConfig(**MODEL))
    poisoned = random_rows._replace(weights_BxT=random_rows.weights_BxT * jnp.inf)
    params, done = pretrain(model, lambda step: poisoned if step else random_rows, config)
    assert done == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.fixture(scope="module")
def random_rows():
    from popax.types import Batch

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (2, 13), dtype=np.int32)
    ones = np.ones((2, 12), np.int32)
    return Batch(
        tokens_BxT=tokens[:, :-1],
        targets_BxT=tokens[:, 1:],
        weights_BxT=np.ones((2, 12), np.float32),
        positions_BxT=np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12)),
        segments_BxT=ones,
        target_bytes_BxT=ones,
    )
