"""Per-user data as a TensorFlow Datasets directory (ArrayRecord files), written and read without TensorFlow.

Records stand in the order of the sources; `users.arrow` beside them maps each user to their records in time order, so
that one user is a handful of random reads. The directory is what `tfds.load` and `tfds.builder_from_directory` expect:
<directory>/<name>/<version>/.
"""

import bisect
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import tensorflow_datasets as tfds
from tqdm import tqdm

from popax.data.records import Columns, Example, Sources, find_sources, read_examples
from popax.errors import DataError

VERSION = "1.0.0"
SPLIT = "train"
INDEX_FILE = "users.arrow"
SHARD_BYTES = 64 << 20  # a shard is held in memory while it is written
_FIELDS = ("user", "time", "kind", "text", "prompt", "completion", "messages")


def build_dataset(
    sources: Sources,
    directory: str | Path,
    *,
    name: str = "users",
    columns: Columns | None = None,
    progress: bool = True,
) -> Path:
    """Reads the sources (popax.data.records) into a TFDS dataset and returns its directory.

    All records are checked before the first is written, and the directory appears whole or not at all. Raises
    DataError for a malformed record, empty sources, or a dataset that is there already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise DataError(f"dataset name {name!r}: lower-case letters, digits and _ only, a letter first")
    directory = Path(directory)
    target = directory / name / VERSION
    if target.exists():
        raise DataError(f"{target} exists; remove it, or choose another directory or name")
    files = find_sources(sources)
    plan = _plan(iter(tqdm(read_examples(files, columns), "reading", disable=not progress, unit=" examples")))
    if not plan.shard_lengths:
        raise DataError(f"no records in {', '.join(str(file) for file in files)}")
    directory.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{name}-building-", dir=directory))
    try:
        examples = tqdm(
            read_examples(files, columns), "writing", sum(plan.shard_lengths), disable=not progress, unit=" examples"
        )
        _UsersBuilder(name, building, iter(examples), plan.shard_lengths).download_and_prepare()
        _write_index(building / name / VERSION / INDEX_FILE, plan.records)
        target.parent.mkdir(exist_ok=True)
        (building / name / VERSION).rename(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


class RecordReader:
    """Random access to a directory that `build_dataset` wrote: users, and each user's examples in time order."""

    def __init__(self, directory: str | Path):
        """directory: the dataset's, or the one given to `build_dataset` where it holds a single dataset."""
        self.directory = _find_dataset(Path(directory))
        try:
            builder = tfds.builder_from_directory(builder_dir=str(self.directory))
            self._source = builder.as_data_source(SPLIT)  # pyright: ignore[reportCallIssue]
            with pa.memory_map(str(self.directory / INDEX_FILE)) as file:
                self._index = pa.ipc.open_file(file).get_batch(0)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise DataError(f"{self.directory} is not a popax dataset: {error}; build it with build_dataset") from error
        self._users = self._index.column("user")

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self._source)

    def users(self) -> list[str]:
        """All users, sorted."""
        return self._users.to_pylist()

    def record_ids(self, user: str) -> list[int]:
        """Positions of the user's records in time order. Raises DataError for an unknown user."""
        row = bisect.bisect_left(range(len(self._users)), user, key=lambda i: self._users[i].as_py())
        if row == len(self._users) or self._users[row].as_py() != user:
            raise DataError(f"no user {user!r} among the {len(self._users)} of {self.directory}")
        return self._index.column("records")[row].as_py()

    def examples(self, user: str) -> list[Example]:
        ids = self.record_ids(user)
        return [_from_record(record, i) for i, record in zip(ids, self._source.__getitems__(ids), strict=True)]


class _Plan(NamedTuple):
    shard_lengths: list[int]
    records: dict[str, list[int]]


def _plan(examples: Iterator[Example]) -> _Plan:
    """Which records belong to whom, in time order, and how many go into each shard."""
    keys: dict[str, list[tuple[Any, int]]] = {}
    lengths: list[int] = []
    room = 0
    for example in examples:
        keys.setdefault(example.user, []).append((example.time, example.index))
        size = sum(len(value) for value in _to_record(example).values())
        if size > room:
            lengths.append(0)
            room = max(SHARD_BYTES, size)
        lengths[-1] += 1
        room -= size
    return _Plan(lengths, {user: _in_time_order(user, keys[user]) for user in sorted(keys)})


def _in_time_order(user: str, keys: list[tuple[Any, int]]) -> list[int]:
    timeless = [index for time, index in keys if time is None]
    if timeless and len(timeless) < len(keys):
        raise DataError(
            f"user {user!r}: record {timeless[0]} (counted from 0 over all sources) has no time, but others of this "
            "user do; give every record a time, or set columns.time to None"
        )
    return [index for _, index in (keys if timeless else sorted(keys))]


def _write_index(path: Path, records: dict[str, list[int]]) -> None:
    batch = pa.record_batch(
        {
            "user": pa.array(list(records), pa.large_string()),
            "records": pa.array(list(records.values()), pa.large_list(pa.int64())),
        }
    )
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


class _UsersBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Shard by shard: the writer that TFDS uses otherwise needs TensorFlow once the data exceed its memory buffer."""

    VERSION = tfds.core.Version(VERSION)
    code_path = None  # where TFDS would look for checksums of downloads

    def __init__(self, name: str, directory: Path, examples: Iterator[Example], shard_lengths: Sequence[int]):
        self.name = name  # pyright: ignore[reportAttributeAccessIssue]
        self._examples, self._shard_lengths = examples, shard_lengths
        super().__init__(data_dir=directory, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Examples by user; users.arrow holds each user's records in time order.",
            features=tfds.features.FeaturesDict({field: tfds.features.Text() for field in _FIELDS}),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(self, dl_manager):
        del dl_manager
        return {SPLIT: [self._shard(length) for length in self._shard_lengths]}

    def _shard(self, length: int):
        def generate():
            count = 0
            for example in itertools.islice(self._examples, length):
                yield example.index, _to_record(example)
                count += 1
            if count < length:
                raise DataError(f"the sources changed while they were read: a shard has {count} of {length} records")

        return generate

    def _log_download_bytes(self) -> None:  # TFDS prints to stdout, where a command's own output goes
        pass

    def _log_download_done(self) -> None:
        pass


def _to_record(example: Example) -> dict[str, str]:
    """Only strings: the record format has no 64-bit float, and times must come back exactly."""
    kind = "messages" if example.messages is not None else "text" if example.text is not None else "completion"
    return {
        "user": example.user,
        "time": "" if example.time is None else json.dumps(example.time),
        "kind": kind,
        "text": example.text or "",
        "prompt": example.prompt or "",
        "completion": example.completion or "",
        "messages": json.dumps(example.messages, ensure_ascii=False) if kind == "messages" else "",
    }


def _from_record(record: dict[str, bytes], index: int) -> Example:
    fields = {name: value.decode() for name, value in record.items()}
    content = {
        "text": lambda: {"text": fields["text"]},
        "completion": lambda: {"prompt": fields["prompt"], "completion": fields["completion"]},
        "messages": lambda: {"messages": tuple(json.loads(fields["messages"]))},
    }[fields["kind"]]()
    time = json.loads(fields["time"]) if fields["time"] else None
    return Example(user=fields["user"], index=index, time=time, **content)


def _find_dataset(directory: Path) -> Path:
    if (directory / "dataset_info.json").is_file():
        return directory
    below = sorted(path.parent for path in directory.glob("*/*/dataset_info.json") if path.parts[-3][0] != ".")
    if len(below) != 1:
        found = ", ".join(str(path) for path in below) or "nothing"
        raise DataError(f"{directory} holds {found}; name the directory of one dataset, as build_dataset returned it")
    return below[0]
