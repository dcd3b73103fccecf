"""Per-user examples read from JSONL, gzipped JSONL, Parquet and CSV, one record at a time."""

import csv
import dataclasses
import datetime
import glob
import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from popax.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".csv")
Sources = str | Path | Sequence[str | Path]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Where a record keeps what; None for a column that is not to be read.

    time: one column, or several that together make a time (("day", "time") for "2004-11-15" and "12:18"); "auto"
    takes `time`, else `timestamp`, where a record has it; None keeps the file's order.
    """

    user: str = "user"
    time: str | tuple[str, ...] | None = "auto"
    text: str | None = "text"
    prompt: str | None = "prompt"
    completion: str | None = "completion"
    messages: str | None = "messages"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One thing a user wrote: a text, a completion of a prompt, or a conversation; exactly one of the three.

    index: place among all records read. time: seconds since the epoch, or whatever number the source orders by.
    """

    user: str
    index: int = 0
    time: int | float | None = None
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None


class Located(NamedTuple):
    """An example, the file it was read from, and its number there: a line, or a row of Parquet, from 1."""

    example: Example
    file: str
    number: int


class _Row(NamedTuple):
    location: str
    number: int
    values: Mapping[str, Any]


# What to do with a record that names its user but is malformed: told the user, the error, the file and the number.
Refuse = Callable[[str, DataError, str, int], None]


def find_sources(sources: Sources) -> list[Path]:
    """The files behind paths, directories (every readable file below) and glob patterns; sorted within each.

    Raises DataError where one of them is nothing, or not of a format in SUFFIXES.
    """
    found: list[Path] = []
    for source in [sources] if isinstance(sources, str | Path) else sources:
        path = Path(source).expanduser()
        if path.is_dir():
            matches = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
        elif path.exists():
            matches = [path]
        else:
            matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        if not matches:
            raise DataError(f"no data at {source}: give files, a directory or a glob of {', '.join(SUFFIXES)}")
        found += matches
    for path in found:
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{path}: unknown format; rename or convert it to one of {', '.join(SUFFIXES)}")
    return found


def read_examples(sources: Sources, columns: Columns | None = None) -> Iterator[Example]:
    """Every example, in the order of the files and of the records in them.

    Raises DataError that names the file and the line (the row in Parquet) of a record without user, without any of
    text, prompt+completion and messages, or malformed.
    """
    return (located.example for located in read_located(sources, columns))


def read_located(
    sources: Sources, columns: Columns | None = None, *, refuse: Refuse | None = None
) -> Iterator[Located]:
    """As `read_examples`, with each example's place; indices count what is yielded.

    refuse: is told of a malformed record whose user is known, which is then left out; None raises it. What cannot be
    anybody's (a line that is not JSON, a record without user) is raised in either case.
    """
    columns = columns or Columns()
    index = 0
    for path in find_sources(sources):
        for location, number, values in _read_rows(path, columns):
            user = _user(location, values, columns)
            try:
                example = _example(location, user, values, columns, index)
            except DataError as error:
                if refuse is None:
                    raise
                refuse(user, error, str(path), number)
                continue
            yield Located(example, str(path), number)
            index += 1


def _read_rows(path: Path, columns: Columns) -> Iterator[_Row]:
    try:
        if path.name.endswith(".parquet"):
            yield from _read_parquet(path)
        elif path.name.endswith(".csv"):
            yield from _read_csv(path, columns)
        else:
            yield from _read_jsonl(path)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read to its end: {error}; is it complete?") from error


def _read_jsonl(path: Path) -> Iterator[_Row]:
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            location = f"{path}:{number}"
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{location}: not JSON ({error}); write one JSON object a line, in UTF-8") from error
            if not isinstance(values, dict):
                raise DataError(f"{location}: a {type(values).__name__}, not a JSON object with a user")
            yield _Row(location, number, values)


def _read_parquet(path: Path) -> Iterator[_Row]:
    with pq.ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield _Row(f"{path}:row {number}", number, values)


def _read_csv(path: Path, columns: Columns) -> Iterator[_Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        location = f"{path}:1"
        try:
            header = set(reader.fieldnames or ())
            # An empty cell is an empty text where only one kind of example can be meant, otherwise a missing value.
            kinds = header & {columns.text, columns.completion, columns.messages}
            for values in reader:
                location = f"{path}:{reader.line_num}"
                if None in values or None in values.values():
                    raise DataError(
                        f"{location}: not as many cells as the header's {len(header)}; quote commas in text"
                    )
                cells = {k: v if v or len(kinds) == 1 else None for k, v in values.items()}
                yield _Row(location, reader.line_num, cells)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"{location} or the line after: {error}; use JSONL or Parquet for long documents"
            ) from error


def _user(location: str, values: Mapping[str, Any], columns: Columns) -> str:
    user = values.get(columns.user)
    if isinstance(user, int) and not isinstance(user, bool):
        user = str(user)
    if not isinstance(user, str) or not user.strip():
        raise DataError(
            f"{location}: {columns.user!r} is {user!r}; every record needs a non-empty user "
            "(or name the column that holds it: columns.user)"
        )
    _refuse_surrogates(location, user)
    return user


def _example(location: str, user: str, values: Mapping[str, Any], columns: Columns, index: int) -> Example:
    content = _content(location, values, columns)
    example = Example(user=user, index=index, time=_time(location, values, columns), **content)
    _refuse_surrogates(location, content)
    return example


def _refuse_surrogates(location: str, value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{location}: holds half of a surrogate pair, which is not text ({error})") from error


def _content(location: str, values: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    def value(column: str | None) -> Any:
        return None if column is None else values.get(column)

    text, messages = value(columns.text), value(columns.messages)
    prompt, completion = value(columns.prompt), value(columns.completion)
    kinds = [text is not None, completion is not None, messages is not None]
    if sum(kinds) != 1 or (completion is None) != (prompt is None):
        present = sorted(name for name, entry in values.items() if entry is not None)
        raise DataError(
            f"{location}: needs exactly one of {columns.text!r}, {columns.prompt!r} with {columns.completion!r}, and "
            f"{columns.messages!r}; it has {present} (set a column that is not to be read to None)"
        )
    if messages is not None:
        return {"messages": _messages(location, messages)}
    given = {"text": text} if text is not None else {"prompt": prompt, "completion": completion}
    for name, entry in given.items():
        if not isinstance(entry, str):
            raise DataError(f"{location}: {name} is a {type(entry).__name__}, not a string")
    return given


def _messages(location: str, messages: Any) -> tuple[Mapping[str, Any], ...]:
    if isinstance(messages, str):  # as CSV has to hold them
        try:
            messages = json.loads(messages)
        except ValueError as error:
            raise DataError(f"{location}: messages is not a JSON list ({error})") from error
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{location}: messages is not a list such as [{{"role": "user", "content": "hi"}}]')
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f'{location}: a message without a role: {message!r}; write {{"role": ..., "content": ...}}')
    # Parquet gives every message every field of the schema.
    return tuple({key: value for key, value in message.items() if value is not None} for message in messages)


def _time(location: str, values: Mapping[str, Any], columns: Columns) -> int | float | None:
    if columns.time is None:
        return None
    if columns.time == "auto":
        names = ("time",) if values.get("time") is not None else ("timestamp",)
        if values.get(names[0]) is None:
            return None
    else:
        names = (columns.time,) if isinstance(columns.time, str) else tuple(columns.time)
    parts = [values.get(name) for name in names]
    label = "+".join(names)
    if any(part is None or part == "" for part in parts):
        raise DataError(f"{location}: {label} is missing; give every record a time, or set columns.time to None")
    return _seconds(location, label, parts[0] if len(parts) == 1 else " ".join(str(part) for part in parts))


def _seconds(location: str, label: str, value: Any) -> int | float:
    """Numbers stay what they are; dates become seconds since the epoch, UTC where they name no zone."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    if isinstance(value, str):
        if re.fullmatch(r"[+-]?\d+", value):
            return int(value)
        if re.fullmatch(r"\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?", value):
            raise DataError(
                f"{location}: {label} {value!r} is a time of day without a date and cannot order the user's examples; "
                'name the date column, as in columns.time="day" (the file orders what a day holds) or ("day", "time"), '
                "or set columns.time to None"
            )
        try:
            return float(value) if re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", value) else _epoch(value)
        except ValueError:
            pass
    if isinstance(value, datetime.date):
        return _epoch(value.isoformat())
    raise DataError(f"{location}: {label} {value!r} is neither a number nor a date such as 2004-11-15T12:18:00")


def _epoch(text: str) -> float:
    moment = datetime.datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
