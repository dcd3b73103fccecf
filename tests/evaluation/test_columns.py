"""The four columns: bits per byte against closed forms, who is scored with whose adapter, and what is counted."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.data.pipeline import PipelineConfig, UserPipeline
from popax.data.tokenize import load_tokenizer
from popax.data.users import UserDataset
from popax.errors import DataError
from popax.evaluation.columns import EvalConfig, Scorer, UserScores, bits_per_byte, figures, four_columns
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.objectives.base import LossSums
from popax.objectives.sft import sft

VOCAB = 259
MODEL = Model(
    ModelConfig(
        vocab_size=VOCAB,
        embed_dim=16,
        ffw_dim=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_seq_len=32,
        tied_embeddings=True,
    )
)
COHORT = Cohort.of(AdapterConfig(rank=2), MODEL.sites())
USERS = ["a", "b", "c", "d", "e"]


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


@pytest.fixture(scope="module")
def data() -> UserPipeline:
    """User i wrote 4 + 3i texts; half of them, of 3 bytes in 3 characters or 4 in 2, are held out."""
    texts = {user: ["abc", "\u00e9\u00fc"] * (2 + i) + ["abc"] * i for i, user in enumerate(USERS)}
    config = PipelineConfig(seq_len=8, batch_size=2, past_fraction=0.5, validation_fraction=0.0)
    return UserPipeline(UserDataset.from_examples(texts), load_tokenizer("byte"), config)


@pytest.fixture(scope="module")
def adapters():
    rng = np.random.default_rng(0)
    fill = lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(leaf.dtype)  # noqa: E731
    return {user: jax.tree.map(fill, COHORT.abstract()) for user in USERS}


def stacked(adapters, users):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(adapters[user] for user in users))


def scorer(params, **settings) -> Scorer:
    return Scorer(sft(MODEL), COHORT, params, {}, EvalConfig(**settings))


def columns(params, data, adapters, users=USERS, **settings) -> list[UserScores]:
    return four_columns(scorer(params, **settings), data, users, lambda group: stacked(adapters, group))


def held_out(data, user):
    """(targets, bytes) of the user's future, counted from the texts: the byte tokenizer adds one end token a text."""
    texts = [example.text.encode() for example in data.dataset.examples(user)]
    past = int(len(texts) * 0.5 + 0.5)
    return sum(len(text) + 1 for text in texts[past:]), sum(map(len, texts[past:]))


def test_a_uniform_model_spends_log2_of_the_vocabulary_a_token(params, data):
    # A head of zeros gives equal logits: each target costs log2(V) bits.
    blind = {**params, "embed": jax.tree.map(jnp.zeros_like, params["embed"])}
    sums = scorer(blind).base_sums(data, USERS)
    for index, user in enumerate(USERS):
        targets, num_bytes = held_out(data, user)
        assert sums.targets[index] == targets
        assert sums.target_bytes[index] == num_bytes
        assert bits_per_byte(sums)[index] == pytest.approx(math.log2(VOCAB) * targets / num_bytes, rel=1e-5)


def test_bits_per_byte_of_nothing_is_nan():
    sums = LossSums(np.array([math.log(2) * 6, 0.0]), np.array([2.0, 0.0]), np.array([3.0, 0.0]))
    np.testing.assert_array_equal(bits_per_byte(sums), [2.0, np.nan])


@pytest.mark.parametrize(("group", "rows"), [(1, 1), (2, 3), (5, 100), (16, 2)])
def test_groups_and_padding_do_not_change_a_score(params, data, adapters, group, rows):
    whole = columns(params, data, adapters, group=4, rows=4)
    parts = columns(params, data, adapters, group=group, rows=rows)
    for one, other in zip(whole, parts, strict=True):
        assert (one.user, one.target_bytes) == (other.user, other.target_bytes)
        assert (one.base, one.own, one.wrong) == pytest.approx((other.base, other.own, other.wrong), rel=1e-5)


def test_wrong_is_the_next_users_adapter_on_ones_own_text(params, data, adapters):
    scores = {row.user: row for row in columns(params, data, adapters, group=2)}
    following = {user: USERS[(i + 1) % len(USERS)] for i, user in enumerate(USERS)}
    rotated = {user: adapters[following[user]] for user in USERS}
    expected = bits_per_byte(scorer(params, group=2).adapter_sums(data, USERS, lambda g: stacked(rotated, g)))
    assert [scores[user].wrong for user in USERS] == pytest.approx(expected, rel=1e-6)
    assert all(abs(row.wrong - row.own) > 1e-4 for row in scores.values())


def test_zero_adapters_score_as_the_base_and_shared_is_absent_or_its_own(params, data, adapters):
    nothing = {user: jax.tree.map(np.zeros_like, adapter) for user, adapter in adapters.items()}
    for row in columns(params, data, nothing):
        assert row.own == pytest.approx(row.base, rel=1e-6)
        assert math.isnan(row.shared)
    one = lambda group: stacked(adapters, ["c"] * len(group))  # noqa: E731
    own = lambda group: stacked(adapters, group)  # noqa: E731
    scores = {row.user: row for row in four_columns(scorer(params), data, USERS, own, one)}
    assert scores["c"].shared == pytest.approx(scores["c"].own, rel=1e-6)
    assert scores["b"].shared == pytest.approx(scores["b"].wrong, rel=1e-6)  # c follows b


def test_max_rows_and_split_choose_the_text(params, data):
    counted = scorer(params, max_rows=1).base_sums(data, USERS)
    assert all(counted.targets <= 8)
    rows = [data.rows(user, "future") for user in USERS]
    np.testing.assert_array_equal(counted.targets, [row.weights_BxT[:1].sum() for row in rows])
    past = scorer(params, split="past").base_sums(data, USERS)
    np.testing.assert_array_equal(past.targets, [data.rows(user, "past").weights_BxT.sum() for user in USERS])


def test_fewer_than_two_users_are_named(params, data, adapters):
    with pytest.raises(DataError, match="at least two"):
        columns(params, data, adapters, users=["a"])
    with pytest.raises(DataError, match="no users"):
        scorer(params).base_sums(data, [])


def test_figures_are_fractions_of_scored_users_and_plain_means():
    row = UserScores(user="a", target_bytes=10, base=2.0, shared=1.8, own=1.9, wrong=2.1)
    worse = dataclasses.replace(row, user="b", own=2.2)
    same = dataclasses.replace(row, user="c", own=2.0)  # a tie is no win
    silent = UserScores(user="d", target_bytes=0, base=np.nan, shared=np.nan, own=np.nan, wrong=np.nan)
    found = figures([row, worse, same, silent])
    assert found["users"] == 3
    assert found["own_beats_base"] == pytest.approx(1 / 3)
    assert found["own_beats_wrong"] == pytest.approx(2 / 3)
    assert found["own_beats_shared"] == 0.0
    assert found["mean_own_bits_per_byte"] == pytest.approx((1.9 + 2.2 + 2.0) / 3)
    without = figures([dataclasses.replace(row, shared=np.nan)])
    assert math.isnan(without["own_beats_shared"])
    assert math.isnan(without["mean_shared_bits_per_byte"])
    assert without["own_beats_base"] == 1.0
    assert math.isnan(figures([silent])["mean_base_bits_per_byte"])
