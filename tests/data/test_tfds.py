"""The TFDS directory: genuine, written and read without TensorFlow, atomic, one user by random access."""

import gzip
import json
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds

from popax.data.records import Columns, read_examples
from popax.data.tfds import build_dataset
from popax.data.users import UserDataset
from popax.errors import DataError
from tests.shared_data import SHARED, needs_shared


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "n": 1.5}]
    records = [{"user": "../evil", "time": 9.25 - i, "text": f"é{i}"} for i in range(4)]
    records += [{"user": "bob", "time": 2**61 + 1 - i, "prompt": "p", "completion": f"c{i}"} for i in range(2)]
    records += [{"user": "åsa", "messages": turns}, {"user": "åsa", "text": ""}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_users_come_back_in_time_order(source, tmp_path):
    directory = build_dataset(source, tmp_path / "out", progress=False)
    dataset = UserDataset.open(directory)
    assert dataset.users() == sorted(["../evil", "bob", "åsa"])
    assert [e.text for e in dataset.examples("../evil")] == ["é3", "é2", "é1", "é0"]
    assert [e.completion for e in dataset.examples("bob")] == ["c1", "c0"]  # times that a float cannot tell apart
    everything = sorted((e for user in dataset.users() for e in dataset.examples(user)), key=lambda e: e.index)
    assert everything == list(read_examples(source))
    assert [dataset.num_examples(user) for user in dataset.users()] == [4, 2, 2]
    with pytest.raises(DataError, match="no user 'eve' among the 3"):
        dataset.examples("eve")
    assert UserDataset.open(tmp_path / "out").users() == dataset.users()


def test_tfds_itself_reads_it(source, tmp_path):
    directory = build_dataset(source, tmp_path / "out", name="mine", progress=False)
    assert directory == tmp_path / "out" / "mine" / "1.0.0"
    builder = tfds.builder_from_directory(str(directory))
    assert builder.info.splits["train"].num_examples == 8
    assert builder.info.file_format.value == "array_record"
    records = builder.as_data_source("train")
    assert len(records) == 8
    assert records[0]["text"].decode() == "é0"
    assert tfds.data_source("mine", data_dir=str(tmp_path / "out"), split="train")[3]["text"].decode() == "é3"


def test_needs_no_tensorflow(source, tmp_path):
    program = (
        "import sys; from popax.data.tfds import build_dataset; from popax.data.users import UserDataset\n"
        "path = build_dataset(sys.argv[1], sys.argv[2], progress=False)\n"
        "assert len(UserDataset.open(path).examples('../evil')) == 4\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'tensorflow'], 'tensorflow was imported'\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(source), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""  # a command's own output goes there


def test_several_shards(source, tmp_path, monkeypatch):
    monkeypatch.setattr("popax.data.tfds.SHARD_BYTES", 40)
    directory = build_dataset(source, tmp_path / "out", progress=False)
    assert len(list(directory.glob("*.array_record*"))) > 2
    dataset = UserDataset.open(directory)
    assert [e.text for e in dataset.examples("../evil")] == ["é3", "é2", "é1", "é0"]


def test_nothing_half_written_is_visible(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with source.open("a") as file:
        file.write('{"text": "nobody"}\n')
    with pytest.raises(DataError, match=r"in\.jsonl:9"):
        build_dataset(source, out, progress=False)
    assert not out.exists()
    lines = source.read_text().splitlines()[:8]
    source.write_text("\n".join(lines))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("popax.data.tfds._write_index", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_dataset(source, out, progress=False)
    assert list(out.iterdir()) == []
    directory = build_dataset(source, out, progress=False)
    assert [path.name for path in out.iterdir()] == ["users"]
    with pytest.raises(DataError, match="exists; remove it"):
        build_dataset(source, out, progress=False)
    (directory / "users.arrow").unlink()
    with pytest.raises(DataError, match="is not a popax dataset"):
        UserDataset.open(directory)


def test_bad_builds_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("")
    with pytest.raises(DataError, match="no records in"):
        build_dataset(path, tmp_path / "out", progress=False)
    path.write_text('{"user": "u", "text": "x", "time": 1}\n{"user": "u", "text": "y"}\n')
    with pytest.raises(DataError, match=r"user 'u': .*a\.jsonl, record 2 has no time"):
        build_dataset(path, tmp_path / "out", progress=False)
    with pytest.raises(DataError, match=r"dataset name '\.\./x'"):
        build_dataset(path, tmp_path / "out", name="../x", progress=False)
    with pytest.raises(DataError, match="holds nothing"):
        UserDataset.open(tmp_path)


@needs_shared("irc_ubuntu_users")
def test_irc_messages_through_the_builder(tmp_path):
    with gzip.open(SHARED / "irc_ubuntu_users" / "messages.jsonl.gz", "rt") as lines:
        subset = [line for line, _ in zip(lines, range(5000), strict=False)]
    (tmp_path / "irc.jsonl").write_text("".join(subset))
    columns = Columns(time="day")  # the clock of some days has 12 hours: 01:00 comes after 12:59
    dataset = UserDataset.open(build_dataset(tmp_path / "irc.jsonl", tmp_path / "out", columns=columns, progress=False))
    records = [json.loads(line) for line in subset]
    assert dataset.users() == sorted({record["user"] for record in records})
    largest = max(dataset.users(), key=dataset.num_examples)
    expected = [record["text"] for record in records if record["user"] == largest]  # the file is in time order

    examples = dataset.examples(largest)
    assert [example.text for example in examples] == expected
    assert [e.time for e in examples] == sorted(e.time for e in examples)
