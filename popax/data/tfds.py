"""Per-user data as a TensorFlow Datasets directory (ArrayRecord files), written and read without TensorFlow.

Records stand in the order of the sources; `users.arrow` beside them maps each user to their records in time order and
to the digest of their text, so that one user is a handful of random reads, and who has something new is known without
any. The directory is what `tfds.load` and `tfds.builder_from_directory` expect:
<directory>/<name>/<version>/.
"""

import dataclasses
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import tensorflow_datasets as tfds
from tqdm import tqdm

from popax.data.digest import ExamplesDigest, digest_of
from popax.data.places import Places, Refused
from popax.data.reader import DIGEST, INDEX_FILE, PLACES, REFUSED, SPLIT, open_source, read_at
from popax.data.record_format import FIELDS, to_record
from popax.data.records import Columns, Example, Located, Refuse, Sources, find_sources, read_located
from popax.errors import DataError

VERSION = "1.0.0"
SHARD_BYTES = 64 << 20  # a shard is held in memory while it is written


def build_dataset(
    sources: Sources,
    directory: str | Path,
    *,
    name: str = "users",
    columns: Columns | None = None,
    progress: bool = True,
    set_aside: bool = False,
) -> Path:
    """Reads the sources (popax.data.records) into a TFDS dataset and returns its directory.

    All records are checked before the first is written, and the directory appears whole or not at all. set_aside: a
    user with a malformed record is left out, and named in `UserDataset.refused`. Raises DataError for a malformed
    record (with set_aside: for one that cannot be anybody's), empty sources, or a dataset that is there already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise DataError(f"dataset name {name!r}: lower-case letters, digits and _ only, a letter first")
    directory = Path(directory)
    target = directory / name / VERSION
    if target.exists():
        raise DataError(f"{target} exists; remove it, or choose another directory or name")
    files = find_sources(sources)
    refused: dict[str, Refused] = {}

    def refuse(user: str, error: DataError, file: str, number: int) -> None:
        refused.setdefault(user, Refused(reason=str(error), file=file, record=number))

    def located(verb: str, total: int | None = None) -> Iterator[Located]:
        read = read_located(files, columns, refuse=refuse if set_aside else None)
        return iter(tqdm(read, verb, total, disable=not progress, unit=" examples"))

    plan = _plan(located("reading"), refused, refuse if set_aside else None)
    if not plan.records:
        first = next(iter(refused.values()), None)
        why = f"no users are left of {len(refused)}, the first: {first.reason}" if first else "no records"
        raise DataError(f"{why} in {', '.join(str(file) for file in files)}")
    directory.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{name}-building-", dir=directory))
    try:
        examples = (one.example for one in located("writing", sum(plan.shard_lengths)))
        _UsersBuilder(name, building, examples, plan.shard_lengths).download_and_prepare()
        _write_index(building / name / VERSION, plan, refused)
        target.parent.mkdir(exist_ok=True)
        (building / name / VERSION).rename(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


class _Plan(NamedTuple):
    """records: each user's in time order. digests: of their text; None for who has yet to be read in that order."""

    shard_lengths: list[int]
    records: dict[str, list[int]]
    digests: dict[str, str | None]
    places: Places


def _plan(read: Iterator[Located], refused: Mapping[str, Refused], refuse: Refuse | None) -> _Plan:
    """Which records belong to whom, in time order, and how many go into each shard."""
    keys: dict[str, list[tuple[Any, int]]] = {}
    hashes: dict[str, ExamplesDigest | None] = {}
    places, lengths = Places(), []
    room = 0
    for located in read:
        example = located.example
        places.add(example.index, located.file, located.number)
        own = keys.setdefault(example.user, [])
        if example.time is not None and own and (own[-1][0] is None or example.time < own[-1][0]):
            hashes[example.user] = None  # not in time order as it stands
        elif (digest := hashes.setdefault(example.user, ExamplesDigest())) is not None:
            digest.add(example)
        own.append((example.time, example.index))
        size = sum(len(value) for value in to_record(example).values())
        if size > room:
            lengths.append(0)
            room = max(SHARD_BYTES, size)
        lengths[-1] += 1
        room -= size
    records = {}
    for user in sorted(keys.keys() - refused.keys()):
        ordered = _in_time_order(user, keys[user], places, refuse)
        if ordered:
            records[user] = ordered
    digests = {user: None if (digest := hashes[user]) is None else digest.hexdigest() for user in records}
    return _Plan(lengths, records, digests, places)


def _in_time_order(user: str, keys: list[tuple[Any, int]], places: Places, refuse: Refuse | None) -> list[int]:
    """[] for a user who was refused."""
    timeless = [index for time, index in keys if time is None]
    if timeless and len(timeless) < len(keys):
        file, number = places.of(timeless[0])
        error = DataError(
            f"user {user!r}: {file}, record {number} has no time, but others of this user do; give every record a "
            "time, or set columns.time to None"
        )
        if refuse is None:
            raise error
        refuse(user, error, str(file), number)
        return []
    return [index for _, index in (keys if timeless else sorted(keys))]


def _write_index(directory: Path, plan: _Plan, refused: Mapping[str, Refused]) -> None:
    source = open_source(directory)
    digests = [plan.digests[user] or digest_of(read_at(source, ids)) for user, ids in plan.records.items()]
    batch = pa.record_batch(
        {
            "user": pa.array(list(plan.records), pa.large_string()),
            "records": pa.array(list(plan.records.values()), pa.large_list(pa.int64())),
            DIGEST: pa.array(digests, pa.string()),
        }
    )
    told = json.dumps({user: dataclasses.asdict(one) for user, one in refused.items()})
    schema = batch.schema.with_metadata({PLACES: plan.places.to_json(), REFUSED: told})
    with pa.OSFile(str(directory / INDEX_FILE), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(batch.replace_schema_metadata(schema.metadata))


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
            features=tfds.features.FeaturesDict({field: tfds.features.Text() for field in FIELDS}),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(self, dl_manager):
        del dl_manager
        return {SPLIT: [self._shard(length) for length in self._shard_lengths]}

    def _shard(self, length: int):
        def generate():
            count = 0
            for example in itertools.islice(self._examples, length):
                yield example.index, to_record(example)
                count += 1
            if count < length:
                raise DataError(f"the sources changed while they were read: a shard has {count} of {length} records")

        return generate

    def _log_download_bytes(self) -> None:  # TFDS prints to stdout, where a command's own output goes
        pass

    def _log_download_done(self) -> None:
        pass
