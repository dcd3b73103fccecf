"""Users in memory, and where their past ends."""

import pytest

from popax.data.records import Example
from popax.data.users import UserDataset, split_past_future
from popax.errors import DataError


def test_users_are_sorted_and_a_string_is_an_examples_text():
    own = Example(user="ada", index=7, time=3, text="own")
    dataset = UserDataset.from_examples({"bob": ["one", "two"], "ada": [own]})
    assert dataset.users() == ["ada", "bob"]
    assert dataset.examples("ada") == [own]
    assert dataset.examples("bob") == [
        Example(user="bob", index=0, text="one"),
        Example(user="bob", index=1, text="two"),
    ]
    assert (dataset.num_examples("ada"), dataset.num_examples("bob")) == (1, 2)
    for ask in (dataset.examples, dataset.num_examples):
        with pytest.raises(DataError, match="no user 'eve' among the 2 in memory"):
            ask("eve")


def test_what_is_asked_for_is_a_copy():
    dataset = UserDataset.from_examples({"bob": ["one"]})
    dataset.examples("bob").clear()
    assert dataset.num_examples("bob") == 1


# (n, past fraction, validation fraction) -> how many are past, validation and future.
@pytest.mark.parametrize(
    ("n", "past", "validation", "sizes"),
    [
        (100, 0.8, 0.1, (72, 8, 20)),
        (10, 0.5, 0.0, (5, 0, 5)),
        (10, 1.0, 0.2, (8, 2, 0)),
        (7, 0.5, 0.0, (4, 0, 3)),  # 3.5 is rounded up
        (9, 0.25, 0.0, (2, 0, 7)),  # and 2.25 down
        (3, 0.99, 0.0, (2, 0, 1)),  # one is held out
        (3, 0.01, 0.0, (1, 0, 2)),  # one is learnt from
        (4, 0.99, 0.99, (1, 2, 1)),
        (2, 0.5, 0.5, (1, 0, 1)),
        (1, 0.8, 0.1, (1, 0, 0)),
        (1, 0.01, 0.0, (1, 0, 0)),
        (0, 0.8, 0.1, (0, 0, 0)),
        (4, 0.0, 0.0, (0, 0, 4)),  # nothing of the past is asked for
    ],
)
def test_past_validation_and_future_follow_each_other(n, past, validation, sizes):
    parts = split_past_future(n, past, validation)
    assert tuple(len(part) for part in parts) == sizes
    assert [index for part in parts for index in part] == list(range(n))
