"""Users and their examples in time order, from disk or from memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, final

from popax.data.digest import digest_of
from popax.data.places import Refused
from popax.data.reader import RecordReader
from popax.data.records import Example
from popax.errors import DataError


class _Reader(Protocol):
    def users(self) -> list[str]: ...
    def record_ids(self, user: str) -> Sequence[int]: ...
    def examples(self, user: str) -> list[Example]: ...
    def counts(self) -> dict[str, int]: ...
    def digests(self, users: Sequence[str]) -> dict[str, str]: ...
    def refused(self) -> dict[str, Refused]: ...
    def place(self, example: Example) -> tuple[str | None, int]: ...


@final
class UserDataset:
    """users -> examples in time order; the same whether read from a TFDS directory or given in memory."""

    def __init__(self, reader: _Reader):
        self._reader = reader

    @classmethod
    def open(cls, directory: str | Path) -> "UserDataset":
        """A directory that `popax.data.tfds.build_dataset` wrote. Raises DataError."""
        return cls(RecordReader(directory))

    @classmethod
    def from_examples(cls, examples: Mapping[str, Sequence[Example | str]]) -> "UserDataset":
        """In memory; each user's examples are in time order already, and a string is an example's text."""
        return cls(_InMemory(examples))

    def users(self) -> list[str]:
        """All user ids, sorted."""
        return self._reader.users()

    def num_examples(self, user: str) -> int:
        """Raises DataError for an unknown user, as `examples` does."""
        return len(self._reader.record_ids(user))

    def examples(self, user: str) -> list[Example]:
        """All of the user's examples, oldest first."""
        return self._reader.examples(user)

    def counts(self) -> dict[str, int]:
        """Everybody's number of examples, without reading any."""
        return self._reader.counts()

    def digests(self, users: Sequence[str]) -> dict[str, str]:
        """The digest of each of these users' text (`popax.data.digest`).

        It is part of a built dataset; of one that an older version built, and in memory, the text is read for it.
        """
        known = self._reader.digests(users)
        return {user: known[user] if user in known else digest_of(self.examples(user)) for user in users}

    def refused(self) -> dict[str, Refused]:
        """Users whose records could not be taken when it was built: they are not among `users`."""
        return self._reader.refused()

    def place(self, example: Example) -> tuple[str | None, int]:
        """The file that one of its examples was read from (None: none is known) and the example's number there."""
        return self._reader.place(example)


class _InMemory:
    def __init__(self, examples: Mapping[str, Sequence[Example | str]]):
        self._examples = {
            user: [
                Example(user=user, index=index, text=example) if isinstance(example, str) else example
                for index, example in enumerate(examples[user])
            ]
            for user in sorted(examples)
        }

    def users(self) -> list[str]:
        return list(self._examples)

    def record_ids(self, user: str) -> Sequence[int]:
        return range(len(self.examples(user)))

    def examples(self, user: str) -> list[Example]:
        if user not in self._examples:
            raise DataError(f"no user {user!r} among the {len(self._examples)} in memory")
        return list(self._examples[user])

    def counts(self) -> dict[str, int]:
        return {user: len(own) for user, own in self._examples.items()}

    def digests(self, users: Sequence[str]) -> dict[str, str]:
        return {}  # text in memory is as quickly read

    def refused(self) -> dict[str, Refused]:
        return {}

    def place(self, example: Example) -> tuple[str | None, int]:
        return None, example.index + 1


class PastFuture(NamedTuple):
    """Ranges over a user's examples in time order: what is trained on, what stops training early, what is held out."""

    past: range
    validation: range
    future: range


def split_past_future(n: int, past_fraction: float, validation_fraction: float) -> PastFuture:
    """n examples -> the first past_fraction, of which the last validation_fraction is set apart, and the rest.

    A fraction strictly between 0 and 1 leaves at least one example on each side, as far as there are two; the part
    that is trained on comes first: a single example is past.
    """
    past = _cut(n, past_fraction)
    train = _cut(past, 1.0 - validation_fraction)
    return PastFuture(range(train), range(train, past), range(past, n))


def _cut(n: int, fraction: float) -> int:
    """round(n * fraction), neither side empty where both are asked for and n >= 2."""
    cut = int(n * fraction + 0.5)
    if n and 0.0 < fraction < 1.0:
        cut = max(1, min(cut, n - 1))
    return cut
