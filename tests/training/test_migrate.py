"""A population on a new base: the same update, or the nearest where there is none, and both gains told."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.apply import bind
from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.data.pipeline import PipelineConfig, UserPipeline
from popax.data.tokenize import load_tokenizer
from popax.data.users import UserDataset
from popax.errors import BaseMismatchError, PopulationError
from popax.evaluation.columns import EvalConfig
from popax.evaluation.revisions import score_revisions
from popax.modeling.base import new_base
from popax.modeling.model import Model
from popax.objectives.base import mean_of
from popax.objectives.distill import DistillBatch, distill, pair
from popax.population.early_stop import EarlyStop
from popax.population.optimizer import constant
from popax.store import Catalog, RowLayout
from popax.training.config import TrainConfig
from popax.training.files import shared_arrays
from popax.training.migrate import migrate
from popax.training.pretrain import PretrainConfig, pretrain
from popax.training.reapply import reapplied
from popax.training.run import train_population

CONFIG = EvalConfig(group=2, rows=2)
USERS = [f"user-{index:03d}" for index in range(3)]


@pytest.fixture(scope="module")
def shifted(base):
    """The base, moved a little: what further training would do to it."""
    keys = iter(jax.random.split(jax.random.key(5), 1000))
    moved = jax.tree.map(lambda leaf: leaf + 0.02 * jax.random.normal(next(keys), leaf.shape), base.params)
    return new_base(base.model, moved, source="shifted")


@pytest.fixture(params=["lora", "lora_xs"])
def populated(request, base, tmp_path):
    """(catalog, cohort, each user's adapter): loud adapters of three users on the base."""
    config = AdapterConfig(method=request.param, rank=2, alpha=8.0)
    cohort = Cohort.of(config, base.model.sites())
    catalog = Catalog.open(tmp_path / "catalog", create=True)
    shared = jax.tree.map(np.asarray, shared_arrays(base, cohort, catalog))
    stored = catalog.cohort(config, cohort.specs, base.digest, RowLayout.of(cohort.abstract()), shared or None)
    rng = np.random.default_rng(0)
    adapters = {}
    for user in USERS:
        fill = lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(leaf.dtype)  # noqa: E731
        adapters[user] = jax.tree.map(fill, cohort.abstract())
        catalog.commit(stored, user, adapters[user], metrics={"steps": 3})
    return catalog, cohort, adapters


def _all(*arguments):
    return [one for group in migrate(*arguments) for one in group]


@pytest.mark.slow
def test_each_user_has_a_derived_revision_with_both_gains(populated, base, shifted, pipeline_of):
    catalog, cohort, _ = populated
    done = _all(base, shifted, pipeline_of(3), catalog, USERS, CONFIG)
    assert [(one.user, one.source, one.revision) for one in done] == [(user, 1, 2) for user in USERS]
    for one in done:
        adapter, manifest = catalog.load(one.user, base_digest=shifted.digest)
        assert manifest.derived_from[0][:2] == (one.user, 1)
        told = manifest.provenance["migration"]
        assert (told["from_base"], told["how"]) == (base.digest, "reapplied")
        assert (told["gain_before"], told["gain_after"]) == (one.gain_before, one.gain_after)
        assert one.gain_before != one.gain_after
        assert one.update_error == 0 if cohort.config.method == "lora" else 0 < one.update_error < 1
        assert jax.tree.map(np.shape, adapter) == jax.tree.map(lambda leaf: leaf.shape, cohort.abstract())
    with pytest.raises(BaseMismatchError, match="popax migrate"):
        catalog.load(USERS[0], base_digest=base.digest)
    # Again: nothing is left to do.
    assert _all(base, shifted, pipeline_of(3), catalog, USERS, CONFIG) == []
    assert [catalog.load(user)[1].revision for user in USERS] == [2, 2, 2]
    assert catalog.verify().clean


@pytest.mark.slow
def test_the_gains_are_those_of_an_evaluation(populated, base, shifted, pipeline_of):
    catalog, _, _ = populated

    def gains(on, revision):
        manifests = catalog.resolve([(user, revision) for user in USERS])
        scored = score_revisions(on, pipeline_of(3), catalog, manifests, CONFIG)
        return {manifest.user: scores.gain for group in scored for manifest, scores in group}

    before = gains(base, 1)
    done = _all(base, shifted, pipeline_of(3), catalog, USERS, CONFIG)
    after = gains(shifted, 2)
    for one in done:
        np.testing.assert_allclose(one.gain_before, before[one.user], atol=1e-6)
        np.testing.assert_allclose(one.gain_after, after[one.user], atol=1e-6)


def test_the_core_is_the_least_squares_one(base, shifted):
    """Against lstsq on the weights themselves: vec(A'^T X B') = (A'^T kron B'^T) vec(X), in float64."""
    cohort = Cohort.of(AdapterConfig(method="lora_xs", rank=2), base.model.sites())
    old, new = (
        jax.tree.map(np.asarray, cohort.shared(lambda site, b=b: b.model.site_weight(b.params, site)))
        for b in (base, shifted)
    )
    rng = np.random.default_rng(1)
    adapters_N = jax.tree.map(lambda leaf: rng.normal(size=(2, *leaf.shape)).astype(np.float32), cohort.abstract())
    moved_N, error_N = reapplied(cohort, old, new, adapters_N)
    change, norm = np.zeros(2), np.zeros(2)
    for spec in cohort.sites:
        name = spec.info.name
        for layer in range(spec.info.layers):
            a, b = (old[name][leaf][layer].astype(np.float64) for leaf in ("a", "b"))
            other_a, other_b = (new[name][leaf][layer].astype(np.float64) for leaf in ("a", "b"))
            for user in range(2):
                w_DxF = a.T @ adapters_N[name]["core"][user, layer].astype(np.float64).T @ b
                x, *_ = np.linalg.lstsq(np.kron(other_a.T, other_b.T), w_DxF.reshape(-1), rcond=None)
                np.testing.assert_allclose(moved_N[name]["core"][user, layer].T, x.reshape(2, 2), atol=1e-5)
                change[user] += spec.scales[layer] ** 2 * np.sum((other_a.T @ x.reshape(2, 2) @ other_b - w_DxF) ** 2)
                norm[user] += spec.scales[layer] ** 2 * np.sum(w_DxF**2)
    np.testing.assert_allclose(error_N, np.sqrt(change / norm), rtol=1e-5)


def test_on_the_same_base_nothing_changes(base):
    cohort = Cohort.of(AdapterConfig(method="lora_xs", rank=2), base.model.sites())
    shared = jax.tree.map(np.asarray, cohort.shared(lambda site: base.model.site_weight(base.params, site)))
    adapters_N = jax.tree.map(lambda leaf: np.ones((1, *leaf.shape), np.float32), cohort.abstract())
    moved_N, error_N = reapplied(cohort, shared, shared, adapters_N)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), moved_N, adapters_N)
    assert error_N[0] < 1e-6


def test_what_does_not_fit_is_named(populated, base, shifted, pipeline_of):
    catalog, cohort, _ = populated
    wider = Model(dataclasses.replace(base.model.config, embed_dim=32))
    other = new_base(wider, wider.init(jax.random.key(1)), source="wider")
    if cohort.config.method == "lora":
        with pytest.raises(PopulationError, match=r"other shapes .*16.* and .*32.*--distill_steps"):
            _all(base, other, pipeline_of(3), catalog, USERS, CONFIG)
    with pytest.raises(BaseMismatchError, match="neither"):
        _all(shifted, other, pipeline_of(3), catalog, USERS, CONFIG)
    assert jnp.asarray([record.latest for record in catalog.list()]).max() == 1


SETTINGS = {"steps": 100, "learning_rate": 1e-2, "schedule": constant(), "early_stop": None}


def _phrases(words: dict[str, str]) -> UserPipeline:
    """Users who say one word of their own again and again."""
    texts = {user: [f"{word} " * 4 for _ in range(20)] for user, word in words.items()}
    config = PipelineConfig(seq_len=16, batch_size=4, past_fraction=0.8, validation_fraction=0.2)
    return UserPipeline(UserDataset.from_examples(texts), load_tokenizer("byte"), config)


@pytest.fixture(scope="module")
def trained(base):
    """make(seed, **changes) -> a base that has seen the words of sixty others, of the given shape."""
    rng = np.random.default_rng(3)
    others = _phrases({f"other-{index}": "".join(rng.choice(list("abcdefgh"), 5)) for index in range(60)})

    def make(seed, **changes):
        model = Model(dataclasses.replace(base.model.config, embed_dim=32, num_layers=2, **changes))
        config = PretrainConfig(steps=200, warmup_steps=20, learning_rate=1e-2, seed=seed)
        params, _ = pretrain(model, others.mixed(others.dataset.users()).batch, config)
        return new_base(model, params, source=f"seed {seed}")

    return make


@pytest.fixture(scope="module")
def old(trained):
    return trained(0)


@pytest.fixture
def learnt(old, tmp_path):
    """(catalog, data): users whose adapters have learnt their words on the old base."""
    data = _phrases(dict(zip(USERS, ("gfecc", "aaabg", "fheeh"), strict=True)))
    catalog = Catalog.open(tmp_path / "learnt", create=True)
    config = TrainConfig(**SETTINGS, adapter=AdapterConfig(rank=4, alpha=8.0), slots=3)
    train_population(old, data, config, directory=tmp_path / "run", catalog=catalog)
    return catalog, data


def _distilled(*arguments):
    return [one for group in migrate(*arguments[:-1], distillation=arguments[-1]) for one in group]


def _divergences(old, new, catalog, data, of):
    """KL of each user's revision `of` on the new base from their first one on the old base, on text that nobody saw."""
    found = {}
    for user in USERS:
        (taught, one), (learns, other) = catalog.load(user, 1), catalog.load(user, of)
        teacher, student = (catalog.cohort_of(manifest) for manifest in (one, other))
        cohorts = [Cohort(stored.config, tuple(stored.specs.values())) for stored in (teacher, student)]
        batch = jax.tree.map(lambda leaf: leaf[0], data.evaluation([user], "future"))
        objective = mean_of(distill(new.model, old.model, cohorts[0]))
        params = pair(new.params, old.params, {})
        found[user] = float(objective(params, bind(cohorts[1], learns, {}), DistillBatch(batch, taught))[0])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"num_heads": 4}], ids=["same shapes", "other shapes"])
def test_distillation_brings_the_old_words_to_another_base(old, trained, learnt, changes):
    """To a base of another seed, on which the same update means next to nothing."""
    catalog, data = learnt
    other = trained(7, **changes)
    untaught = _distilled(old, other, data, catalog, USERS, CONFIG, TrainConfig(steps=1, learning_rate=0.0))
    before = _divergences(old, other, catalog, data, 2)
    for user in USERS:  # as they were
        adapter, manifest = catalog.load(user, 1)
        catalog.commit(catalog.cohort_of(manifest), user, adapter)
    done = _distilled(old, other, data, catalog, USERS, CONFIG, TrainConfig(**{**SETTINGS, "steps": 250}))
    assert [(one.user, one.source, one.revision, one.how) for one in done] == [(u, 3, 4, "distilled") for u in USERS]
    after = _divergences(old, other, catalog, data, 4)
    for one, first in zip(done, untaught, strict=True):
        assert after[one.user] < 0.2 * before[one.user]
        assert one.gain_before > 0.3
        np.testing.assert_equal(one.gain_reapplied, first.gain_reapplied)
        assert np.isnan(one.gain_reapplied) == bool(changes)
        assert one.gain_after > 0.3 * one.gain_before
        assert changes or one.gain_after > one.gain_reapplied
        _, manifest = catalog.load(one.user, base_digest=other.digest)
        told = manifest.provenance["migration"]
        assert (told["how"], told["gain_after"], told["from_base"]) == ("distilled", one.gain_after, old.digest)
        assert (told["gain_reapplied"], told["update_error"]) == (None, None) or not changes
        assert manifest.derived_from[0][:2] == (one.user, 3)


@pytest.mark.slow
def test_whom_distillation_does_not_help_is_reapplied(old, learnt):
    """On the same base moved by nothing much, the re-applied adapter is the best there is; and without text, all."""
    catalog, data = learnt
    near = new_base(old.model, jax.tree.map(lambda leaf: leaf * (1 + 1e-6), old.params), source="near")
    useless = TrainConfig(steps=10, learning_rate=1.0, early_stop=EarlyStop(every=5, patience=2))
    silent = UserPipeline(
        UserDataset.from_examples({USERS[0]: [e.text for e in data.dataset.examples(USERS[0])], USERS[1]: []}),
        data.tokenizer,
        data.config,
    )
    done = _distilled(old, near, silent, catalog, USERS[:2], CONFIG, useless)
    assert [one.how for one in done] == ["reapplied", "reapplied"]
    np.testing.assert_allclose(done[0].gain_after, done[0].gain_reapplied)
    assert done[0].gain_after > 0.3
    jax.tree.map(np.testing.assert_array_equal, catalog.load(USERS[1])[0], catalog.load(USERS[1], 1)[0])
