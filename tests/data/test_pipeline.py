"""Batches: pure in (user, seed, step), fair, split in time, resumable."""

import collections
import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from popax.data.pipeline import PipelineConfig, UserPipeline, user_seed
from popax.data.records import Example
from popax.data.tokenize import load_tokenizer
from popax.data.users import UserDataset, split_past_future
from popax.errors import ConfigError, DataError, TokenizerError, UserTextError
from popax.types import Batch

BYTE = load_tokenizer("byte")


def make(dataset, **changes):
    return UserPipeline(dataset, BYTE, PipelineConfig(**{"seq_len": 32, "batch_size": 3} | changes))


def equal(one, other):
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def words(batch):
    """The words in the targets of a batch, each of which names its user and its time."""
    tokens = batch.targets_BxT[batch.weights_BxT > 0]
    return [word for word in BYTE.decode(tokens[tokens != BYTE.eos_id]).split() if len(word) == 3]


@given(
    n=st.integers(0, 300),
    past=st.floats(0.01, 1.0),
    validation=st.floats(0.0, 0.9),
)
def test_past_comes_before_validation_before_future(n, past, validation):
    parts = split_past_future(n, past, validation)
    assert [i for part in parts for i in part] == list(range(n))
    if n >= 2 and past < 1.0:
        assert len(parts.past) + len(parts.validation) >= 1
        assert len(parts.future) >= 1
    if n:
        assert len(parts.past) >= 1
    if past == 1.0:
        assert len(parts.future) == 0
    if validation == 0.0:
        assert len(parts.validation) == 0


def test_split_of_a_hundred():
    assert [len(part) for part in split_past_future(100, 0.8, 0.1)] == [72, 8, 20]
    assert [len(part) for part in split_past_future(1, 0.8, 0.1)] == [1, 0, 0]


def test_each_split_holds_its_own_part_of_time(dataset):
    pipeline = make(dataset)
    for user in dataset.users():
        parts = [sorted(set(words(pipeline.rows(user, split)))) for split in ("past", "validation", "future")]
        times = [time for part in parts for time in part]
        assert times == sorted(set(times))  # in order, nothing twice
        assert len(times) == dataset.num_examples(user)


def test_examples_are_ordered_by_the_dataset_not_by_their_text():
    examples = [Example(user="u", time=time, text=f"t{time}") for time in range(10)]
    dataset = UserDataset.from_examples({"u": examples})
    assert dataset.examples("u") == examples
    future = make(dataset).rows("u", "future")
    assert "t8" in BYTE.decode(future.targets_BxT[0])


def test_batch_is_a_pure_function_of_user_seed_and_step(dataset):
    one, other = make(dataset), make(dataset)
    for step in (7, 0, 3):
        assert equal(one.batch("c", step), other.batch("c", step))
    assert one.batch("c", 0).tokens_BxT.shape == (3, 32)
    alone = make(UserDataset.from_examples({"c": dataset.examples("c")}))
    assert equal(alone.batch("c", 5), one.batch("c", 5))  # whoever else is there
    assert not equal(make(dataset, seed=1).batch("c", 0), one.batch("c", 0))
    small_cache = make(dataset, cached_users=1)
    for user in "abab":
        assert equal(small_cache.batch(user, 2), one.batch(user, 2))


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_every_row_is_seen_once_before_any_is_seen_twice(dataset, batch_size):
    pipeline = make(dataset, batch_size=batch_size)
    for user in ("a", "e"):
        rows = [row.tobytes() for row in pipeline.rows(user, "past").targets_BxT]
        assert len(set(rows)) == len(rows)
        seen = [
            row.tobytes()
            for step in range(-(-2 * len(rows) // batch_size))
            for row in pipeline.batch(user, step).targets_BxT
        ]
        orders = [seen[start : start + len(rows)] for start in range(0, 2 * len(rows), len(rows))]
        for order in orders:
            assert sorted(order) == sorted(rows)
    assert orders[0] != orders[1]  # a new order every epoch


def rows_of(batch):
    return [row.tobytes() for row in batch.targets_BxT]


def order_by_hand(seed, user, epoch, length):
    """What decides an order, so that a run can be repeated by whoever has the text: no part of it may change."""
    own = hashlib.blake2b(f"{seed}/{user}".encode(), digest_size=4).digest()
    return np.random.RandomState([int.from_bytes(own, "little"), epoch]).permutation(length).tolist()


def test_a_users_order_is_a_permutation_by_seed_name_and_epoch():
    texts = [f"{number:03d}" for number in range(8)]
    pipeline = make(UserDataset.from_examples({"ada": texts, "bob": texts}), past_fraction=1.0, batch_size=1, seed=5)
    for user in ("ada", "bob"):
        rows = rows_of(pipeline.rows(user, "past"))
        found = [rows.index(row) for step in range(2 * len(rows)) for row in rows_of(pipeline.batch(user, step))]
        assert found == [index for epoch in (0, 1) for index in order_by_hand(5, user, epoch, len(rows))], (
            "another order than the one that was written down"
        )


def test_two_users_with_the_same_text_and_one_user_with_two_seeds_have_orders_of_their_own():
    texts = [f"{number:03d} " * 8 for number in range(40)]
    dataset = UserDataset.from_examples({"ada": texts, "bob": texts})
    orders = {
        (user, seed): tuple(row for step in range(10) for row in rows_of(make(dataset, seed=seed).batch(user, step)))
        for user in ("ada", "bob")
        for seed in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert len({user_seed(user, seed) for user, seed in orders}) == 4
    assert all(0 <= user_seed(f"user-{number}", 0) < 2**32 for number in range(100))
    assert user_seed("1", 0) != user_seed("0", 1)


def test_population_stacks_what_each_user_gets_alone(dataset):
    """Invariant 1, on the data's side: member i's batch is that of i alone."""
    pipeline = make(dataset)
    batch = pipeline.population(["b", None, "e"], [4, 0, 9])
    assert batch.tokens_BxT.shape == (3, 3, 32)
    assert equal(Batch._make(leaf[0] for leaf in batch), pipeline.batch("b", 4))
    assert equal(Batch._make(leaf[2] for leaf in batch), pipeline.batch("e", 9))
    assert not any(leaf[1].any() for leaf in batch)


def test_a_step_of_several_batches_reads_on_where_the_one_before_it_ended(dataset):
    pipeline = make(dataset)
    batch = pipeline.population(["b", None, "e"], [2, 0, 0], 3)
    assert batch.tokens_BxT.shape == (3, 3, 3, 32)
    for part in range(3):
        assert equal(Batch._make(leaf[0, part] for leaf in batch), pipeline.batch("b", 6 + part))
        assert equal(Batch._make(leaf[2, part] for leaf in batch), pipeline.batch("e", part))
    assert not any(leaf[1].any() for leaf in batch)


def test_there_is_room_for_those_who_are_read_again_and_again(dataset, monkeypatch):
    read, encode = [], UserPipeline._read_user
    monkeypatch.setattr(UserPipeline, "_read_user", lambda self, user: read.append(user) or encode(self, user))
    small = make(dataset, cached_users=1)
    roomy = small.for_users(3)
    for _ in range(2):
        for user in "abe":
            assert equal(roomy.batch(user, 1), make(dataset).batch(user, 1))
    assert [
        user for user in read if read.count(user) > 3
    ] == []  # once by it, and by each of two pipelines of one batch
    assert small.for_users(1) is small
    assert roomy.for_users(3) is roomy
    assert roomy.for_users(4) is not roomy


def test_evaluation_pads_to_the_longest(dataset):
    pipeline = make(dataset)
    counts = {user: len(pipeline.rows(user, "future").tokens_BxT) for user in "ae"}
    assert counts["a"] < counts["e"]
    batch = pipeline.evaluation(["a", None, "e"], "future")
    assert batch.tokens_BxT.shape == (3, counts["e"], 32)
    assert equal(Batch._make(leaf[0, : counts["a"]] for leaf in batch), pipeline.rows("a", "future"))
    assert not batch.weights_BxT[0, counts["a"] :].any()
    assert not batch.weights_BxT[1].any()
    assert pipeline.evaluation(["a", "e"], "future", max_rows=2).tokens_BxT.shape == (2, 2, 32)
    assert pipeline.evaluation([None], "past").tokens_BxT.shape == (1, 1, 32)


def test_mixed_is_fair_over_users(dataset):
    mixed = make(dataset).mixed(dataset.users())
    rows = [BYTE.decode(row)[0] for step in range(50) for row in without_cuts(mixed.batch(step))]
    for start in range(0, len(rows) - 5, 5):
        assert sorted(rows[start : start + 5]) == list("abcde")
    assert len({tuple(rows[start : start + 5]) for start in range(0, 150, 5)}) > 5  # not always beside the same user
    again = make(dataset).mixed(dataset.users())
    assert equal(again.batch(17), mixed.batch(17))
    assert [row for row in mixed.batch(0).tokens_BxT if not row.any()] == []


def without_cuts(batch):
    """Rows of any piece: the first three letters of a cut row may not name the user, so look for one that does."""
    for row in batch.tokens_BxT:
        text = row[row < 256]
        yield text[np.isin(text, list(b"abcde"))]


def test_mixed_by_row_sees_every_row_once_an_epoch(dataset):
    pipeline = make(dataset, batch_size=1)
    rows = sorted(row.tobytes() for user in dataset.users() for row in pipeline.rows(user, "past").tokens_BxT)
    mixed = pipeline.mixed(dataset.users(), by="row")
    assert sorted(mixed.batch(step).tokens_BxT[0].tobytes() for step in range(len(rows))) == rows
    assert collections.Counter(rows).most_common(1)[0][1] == 1


def test_mixed_takes_everyone_by_turns_and_each_ones_rows_in_their_order(dataset):
    pipeline = make(dataset, batch_size=5, seed=3)
    mixed = pipeline.mixed(dataset.users())
    rows = {user: rows_of(pipeline.rows(user, "past")) for user in mixed.users}
    for turn in range(2 * max(map(len, rows.values()))):
        users = [mixed.users[index] for index in order_by_hand(3, "", turn, 5)]
        wanted = [
            rows[user][order_by_hand(3, user, turn // len(rows[user]), len(rows[user]))[turn % len(rows[user])]]
            for user in users
        ]
        assert rows_of(mixed.batch(turn)) == wanted


def test_mixed_by_row_is_a_permutation_of_all_rows(dataset):
    pipeline = make(dataset, batch_size=1, seed=3)
    rows = [row for user in dataset.users() for row in rows_of(pipeline.rows(user, "past"))]
    mixed = pipeline.mixed(dataset.users(), by="row")
    found = [rows.index(row) for step in range(len(rows)) for row in rows_of(mixed.batch(step))]
    assert found == order_by_hand(3, "", 0, len(rows))


def test_what_is_asked_for_wrongly_is_named(dataset):
    pipeline = make(dataset)
    with pytest.raises(ConfigError, match="split='present': one of past, validation, future"):
        pipeline.rows("a", "present")
    with pytest.raises(ConfigError, match="by='day'"):
        pipeline.mixed(["a"], by="day")
    with pytest.raises(ValueError, match="zip"):
        pipeline.population(["a", "b"], [0])


def test_the_least_settings_there_are():
    least = {"seq_len": 1, "batch_size": 1, "cached_users": 1, "past_fraction": 1.0, "validation_fraction": 0.0}
    pipeline = UserPipeline(UserDataset.from_examples({"a": ["hi"]}), BYTE, PipelineConfig(**least))
    assert pipeline.rows("a", "past").targets_BxT.tolist() == [[ord("h")], [ord("i")], [BYTE.eos_id]]


def test_documents_share_rows_where_that_is_asked_for():
    dataset = UserDataset.from_examples({"a": ["one", "two"]})
    lengths = [
        len(make(dataset, past_fraction=1.0, validation_fraction=0.0, pack=pack).rows("a", "past").tokens_BxT)
        for pack in (True, False)
    ]
    assert lengths == [1, 2]


def test_users_without_a_past():
    dataset = UserDataset.from_examples({"empty": [], "full": ["text"]})
    pipeline = make(dataset)
    with pytest.raises(DataError, match="user 'empty' has nothing to learn from"):
        pipeline.batch("empty", 0)
    assert pipeline.mixed(["empty", "full"]).users == ["full"]
    with pytest.raises(DataError, match="none of the 1 users"):
        pipeline.mixed(["empty"])
    with pytest.raises(DataError, match="no user 'eve'"):
        pipeline.rows("eve", "past")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 0}, "seq_len=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"cached_users": 0}, "cached_users=0"),
        ({"past_fraction": 0.0}, "past_fraction=0.0"),
        ({"past_fraction": 1.1}, "past_fraction=1.1"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
        ({"validation_fraction": -0.1}, "validation_fraction=-0.1"),
    ],
)
def test_bad_configs_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        PipelineConfig(**{"seq_len": 8, "batch_size": 1} | changes)


class Refusing:
    """A tokenizer that takes no text."""

    def __init__(self, error):
        self.error = error

    def encode(self, text):
        raise self.error


@pytest.mark.parametrize(
    ("error", "words"),
    [(TokenizerError("no token for it"), "no token for it"), (RuntimeError("odd"), "RuntimeError: odd")],
)
def test_a_record_that_cannot_be_tokenised_is_named_with_its_reason(error, words):
    data = UserDataset.from_examples({"u": ["a", "b"]})
    pipeline = UserPipeline(data, Refusing(error), PipelineConfig(seq_len=8, batch_size=1))
    with pytest.raises(UserTextError) as caught:
        pipeline.rows("u", "past")
    assert str(caught.value) == f"user 'u': example 1 cannot be tokenised: {words}; correct or remove it"
    assert (caught.value.record, caught.value.file) == (1, None)
