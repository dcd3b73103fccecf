"""Reading a dataset that popax.data.tfds built: one user is a handful of random reads, without TensorFlow."""

import bisect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import tensorflow_datasets as tfds

from popax.data.places import Places, Refused
from popax.data.record_format import from_record
from popax.data.records import Example
from popax.errors import DataError

SPLIT = "train"
INDEX_FILE = "users.arrow"
DIGEST = "digest"  # a column of the index
PLACES, REFUSED = b"popax.places", b"popax.refused"  # in its schema's metadata
FEW = 64  # looking up one user costs about as much as reading the index of so many


class RecordReader:
    """Random access to a directory that `build_dataset` wrote: users, and each user's examples in time order."""

    def __init__(self, directory: str | Path):
        """directory: the dataset's, or the one given to `build_dataset` where it holds a single dataset."""
        self.directory = _find_dataset(Path(directory))
        try:
            self._source = open_source(self.directory)
            with pa.memory_map(str(self.directory / INDEX_FILE)) as file:
                self._index = pa.ipc.open_file(file).get_batch(0)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise DataError(f"{self.directory} is not a popax dataset: {error}; build it with build_dataset") from error
        self._users = self._index.column("user")
        metadata = self._index.schema.metadata or {}
        self._places = Places.from_json(metadata.get(PLACES, b"[]"))
        self._refused = {user: Refused(**one) for user, one in json.loads(metadata.get(REFUSED, b"{}")).items()}

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self._source)

    def users(self) -> list[str]:
        """All users, sorted."""
        return self._users.to_pylist()

    def record_ids(self, user: str) -> list[int]:
        """Positions of the user's records in time order. Raises DataError for an unknown user."""
        return self._index.column("records")[self._row(user)].as_py()

    def examples(self, user: str) -> list[Example]:
        return read_at(self._source, self.record_ids(user))

    def counts(self) -> dict[str, int]:
        """Each user's number of examples, without reading any."""
        lengths = self._index.column("records").value_lengths()
        return dict(zip(self._users.to_pylist(), lengths.to_pylist(), strict=True))

    def digests(self, users: Sequence[str]) -> dict[str, str]:
        """The digest of each of these users' text, without reading any of it; {} where an older build kept none."""
        if DIGEST not in self._index.schema.names:
            return {}
        column = self._index.column(DIGEST)
        if len(users) * FEW < len(self._users):
            return {user: column[self._row(user)].as_py() for user in users}
        every = dict(zip(self._users.to_pylist(), column.to_pylist(), strict=True))
        return {user: every[user] for user in users if user in every}

    def _row(self, user: str) -> int:
        row = bisect.bisect_left(range(len(self._users)), user, key=lambda i: self._users[i].as_py())
        if row == len(self._users) or self._users[row].as_py() != user:
            raise DataError(f"no user {user!r} among the {len(self._users)} of {self.directory}")
        return row

    def refused(self) -> dict[str, Refused]:
        """Users who were left out when it was built, and why."""
        return dict(self._refused)

    def place(self, example: Example) -> tuple[str | None, int]:
        """The file that an example was read from, None where an older build kept none, and its number there."""
        return self._places.of(example.index)


def open_source(directory: Path) -> Any:
    """Random access to the records of a dataset's directory."""
    builder = tfds.builder_from_directory(builder_dir=str(directory))
    return builder.as_data_source(SPLIT)  # pyright: ignore[reportCallIssue]


def read_at(source: Any, ids: Sequence[int]) -> list[Example]:
    return [from_record(record, i) for i, record in zip(ids, source.__getitems__(list(ids)), strict=True)]


def _find_dataset(directory: Path) -> Path:
    if (directory / "dataset_info.json").is_file():
        return directory
    below = sorted(path.parent for path in directory.glob("*/*/dataset_info.json") if path.parts[-3][0] != ".")
    if len(below) != 1:
        found = ", ".join(str(path) for path in below) or "nothing"
        raise DataError(f"{directory} holds {found}; name the directory of one dataset, as build_dataset returned it")
    return below[0]
