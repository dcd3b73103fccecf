"""Hashes are made once, noted, believed as long as the files are the same, and shared out over processes."""

import dataclasses
import hashlib
import json
import os

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

from popax.distributed.group import ProcessGroup
from popax.errors import CheckpointError
from popax.modeling import hashing
from popax.modeling.hashing import NOTES, Hashing
from popax.modeling.stored_weights import StoredWeights
from popax.modeling.tensor_files import StoredTensor, read_header

FILES = ("a.safetensors", "b.safetensors")
LONG_AGO = 1_700_000_000


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Two old files, and a threshold that makes them worth a note."""
    monkeypatch.setattr(hashing, "NOTED_FROM_BYTES", 1)
    draw = np.random.default_rng(0)
    for file in FILES:
        save_file({f"{file[0]}{i}": draw.normal(size=(3, i + 1)).astype(np.float32) for i in range(3)}, tmp_path / file)
        os.utime(tmp_path / file, (LONG_AGO, LONG_AGO))
    return tmp_path


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the tensors that were hashed from their files."""
    names, sha256 = [], StoredTensor.sha256
    monkeypatch.setattr(StoredTensor, "sha256", lambda tensor: names.append(tensor.name) or sha256(tensor))
    return names


def tensors(directory) -> list[StoredTensor]:
    return [tensor for file in FILES for tensor in read_header(directory / file).values()]


def hashes(directory, group: ProcessGroup | None = None, **options) -> dict[str, str]:
    with Hashing(directory, tensors(directory), group or ProcessGroup.of(None), **options) as made:
        made.begin(tensors(directory)[:2])
        return made.finish()


def expected(directory) -> dict[str, str]:
    return {
        name: hashlib.sha256(value.tobytes()).hexdigest()
        for file in FILES
        for name, value in load_file(directory / file).items()
    }


def test_every_tensor_is_hashed_once_and_noted(directory, read):
    assert hashes(directory) == expected(directory)
    assert sorted(read) == sorted(expected(directory))
    assert hashes(directory) == expected(directory)
    assert len(read) == 6, "what is noted is not hashed again"
    assert hashes(directory, verify=True) == expected(directory)
    assert len(read) == 12
    assert sorted(path.name for path in directory.iterdir()) == [*FILES, NOTES]


def test_a_file_that_changed_is_not_taken_for_the_one_that_was_noted(directory):
    first = hashes(directory)
    changed = load_file(directory / FILES[0]) | {"a1": np.ones((3, 2), np.float32)}
    save_file(changed, directory / FILES[0])  # of the same size, and too young for a note
    assert hashes(directory) == expected(directory) != first
    noted = json.loads((directory / NOTES).read_text())
    assert noted["sha256"] == first, "a young file's hash was noted"
    os.utime(directory / FILES[0], (LONG_AGO + 1, LONG_AGO + 1))
    assert hashes(directory) == expected(directory)
    assert json.loads((directory / NOTES).read_text())["sha256"] == expected(directory)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"format": 2}', '{"format": 1, "files": {}}', '{"format": 1, "files": 3}']
)
def test_notes_that_are_damaged_or_of_another_kind_are_made_again(directory, content):
    (directory / NOTES).write_text(content)
    assert hashes(directory) == expected(directory)
    assert json.loads((directory / NOTES).read_text())["sha256"] == expected(directory)


def test_where_nothing_can_be_written_nothing_is_noted(directory, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(os, "replace", refused)
    assert hashes(directory) == expected(directory)
    assert sorted(path.name for path in directory.iterdir()) == [*FILES]


def test_small_weights_are_worth_no_note(directory, monkeypatch):
    monkeypatch.setattr(hashing, "NOTED_FROM_BYTES", 1 << 28)
    assert hashes(directory) == expected(directory)
    assert not (directory / NOTES).exists()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Later(ProcessGroup):
    """One of several processes that run one after the other, and hears what those before it said."""

    before: tuple = ()

    def gather(self, value):
        return [*self.before, value]


def test_processes_share_the_work_and_know_all_of_it(directory, read):
    shares = []
    for index in range(3):
        made = hashes(directory, Later(index=index, count=3, before=tuple(shares)), verify=True)
        shares.append({name: made[name] for name in read})
        read.clear()
    assert made == expected(directory)
    assert [len(share) for share in shares] == [2, 2, 2]
    assert len({name for share in shares for name in share}) == 6


def test_processes_that_read_other_weights_are_refused(monkeypatch, tiny, tmp_path):
    monkeypatch.setattr(
        ProcessGroup, "gather", lambda group, value: [value, "f" * 64] if isinstance(value, str) else [value]
    )
    stored = StoredWeights(directory=tmp_path, model=tiny.model, sources={})
    with pytest.raises(CheckpointError, match=r"different weights or configs there \(process 0: .*process 1: ffff"):
        stored.digest()


def test_a_mesh_of_one_process_waits_for_nobody():
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    assert ProcessGroup.of(mesh) == ProcessGroup.of(None) == ProcessGroup(index=0, count=1)


def test_a_tensor_that_is_cut_off_while_it_is_read_is_named(directory):
    tensor = tensors(directory)[1]
    with (directory / FILES[0]).open("r+b") as stream:
        stream.truncate(tensor.offset)
    with pytest.raises(CheckpointError, match=f"{FILES[0]} ended {tensor.nbytes} bytes early while {tensor.name} was"):
        tensor.sha256()
    with pytest.raises(CheckpointError, match=f"{FILES[0]} changed while {tensor.name} was read"):
        tensor.read((slice(0, 3), slice(0, 1)))
