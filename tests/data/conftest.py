"""A small in-memory population."""

import pytest

from popax.data.users import UserDataset


@pytest.fixture
def dataset():
    """Users a..e with 4, 9, 14, 19, 24 texts of different lengths; every text names its user and its time."""
    return UserDataset.from_examples(
        {user: [f"{user}{i:02d} " * (1 + (7 * i) % 11) for i in range(4 + 5 * n)] for n, user in enumerate("abcde")}
    )
