"""Sources: the same examples from every format, and errors that name file and line."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from popax.data.records import Columns, Example, find_sources, read_examples
from popax.errors import DataError

RECORDS = [
    {"user": "ann", "time": "2024-05-01T10:00:00", "text": 'comma, "quote"\nnewline å😀'},
    {"user": "bob", "time": "2024-05-01T09:00:00+02:00", "text": "x"},
    {"user": "ann", "time": "2023-01-01", "text": ""},
]


def write(path, records):
    if path.name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records).encode()))
    elif path.name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.csv"])
def test_every_format_gives_the_same_examples(tmp_path, name):
    assert list(read_examples(write(tmp_path / name, RECORDS))) == [
        Example(user="ann", index=0, time=1714557600.0, text=RECORDS[0]["text"]),
        Example(user="bob", index=1, time=1714546800.0, text="x"),
        Example(user="ann", index=2, time=1672531200.0, text=""),
    ]


def test_all_three_kinds(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    records = [
        {"user": 7, "prompt": "2+2=", "completion": "4", "timestamp": 12},
        {"user": "u", "messages": turns, "timestamp": 11.5},
    ]
    expected = [
        Example(user="7", time=12, prompt="2+2=", completion="4"),
        Example(user="u", index=1, time=11.5, messages=tuple(turns)),
    ]
    assert list(read_examples(write(tmp_path / "a.jsonl", records))) == expected
    rows = [{"user": "7", "prompt": "2+2=", "completion": "4", "messages": "", "timestamp": "12"}]
    rows += [{"user": "u", "prompt": "", "completion": "", "messages": json.dumps(turns), "timestamp": "11.5"}]
    assert list(read_examples(write(tmp_path / "a.csv", rows))) == expected


def test_columns_and_times_can_be_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"author": "u", "day": "2004-11-15", "time": "12:18", "body": "hi"}])
    columns = Columns(user="author", text="body", time=("day", "time"))
    assert next(read_examples(path, columns)).time == 1100521080.0
    with pytest.raises(DataError, match=r"a\.jsonl:1: time '12:18' is a time of day without a date.*columns\.time"):
        list(read_examples(path, Columns(user="author", text="body")))
    assert next(read_examples(path, Columns(user="author", text="body", time=None))).time is None


def test_files_directories_and_globs(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.csv", "sub/c.parquet"):
        write(tmp_path / name, RECORDS)
    (tmp_path / "notes.txt").write_text("not data")
    names = ["a.csv", "b.jsonl", "sub/c.parquet"]
    assert find_sources(tmp_path) == [tmp_path / name for name in names]
    assert find_sources([str(tmp_path / "*.jsonl"), tmp_path / "a.csv"]) == [tmp_path / "b.jsonl", tmp_path / "a.csv"]
    assert [e.index for e in read_examples(tmp_path)] == list(range(9))
    with pytest.raises(DataError, match="no data at"):
        find_sources(tmp_path / "*.json")
    with pytest.raises(DataError, match="unknown format"):
        find_sources(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"}', "'user' is None; every record needs a non-empty user"),
        ('{"user": " ", "text": "x"}', "'user' is ' '"),
        ('{"user": true, "text": "x"}', "'user' is True"),
        ('{"user": "u", "text": "x"', "not JSON"),
        (b'{"user": "u", "text": "\xff"}', "not JSON"),
        ('["u", "x"]', "a list, not a JSON object"),
        ('{"user": "u"}', "needs exactly one of"),
        ('{"user": "u", "text": "x", "messages": []}', "needs exactly one of"),
        ('{"user": "u", "prompt": "x"}', "needs exactly one of"),
        ('{"user": "u", "text": 3}', "text is a int, not a string"),
        ('{"user": "u", "messages": []}', "messages is not a list such as"),
        ('{"user": "u", "messages": [{"content": "x"}]}', "a message without a role"),
        ('{"user": "u", "text": "x", "time": "soon"}', "time 'soon' is neither a number nor a date"),
        ('{"user": "u", "text": "x", "time": NaN}', "time nan is neither"),
        ('{"user": "u", "text": "\\ud83d"}', "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    good = b'{"user": "u", "text": "x"}\n\n'
    (tmp_path / "bad.jsonl").write_bytes(good + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good)
    with pytest.raises(DataError, match=r"bad\.jsonl:3: ") as raised:
        list(read_examples(tmp_path / "bad.jsonl"))
    assert message in str(raised.value)


def test_broken_files_are_named(tmp_path):
    whole = write(tmp_path / "a.jsonl.gz", RECORDS * 50).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20])
    write(tmp_path / "b.parquet", RECORDS).write_bytes(b"PAR1")
    (tmp_path / "c.csv").write_text("user,text\nu,x\nu,one,two\n")
    for name, message in [
        ("a.jsonl.gz", "is it complete"),
        ("b.parquet", "is it complete"),
        ("c.csv", r"c\.csv:3: not"),
    ]:
        with pytest.raises(DataError, match=message):
            list(read_examples(tmp_path / name))


def test_jsonl_is_streamed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"user": "u", "text": "x"}\n' * 3 + "broken\n")
    examples = read_examples(path)
    assert [next(examples).index for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError):
        next(examples)
