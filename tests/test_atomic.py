"""Files and directories that are whole or absent."""

import os
import stat

import pytest

from popax.atomic import new_directory, new_file, write_text


def test_a_file_is_whole_or_as_it_was(tmp_path):
    place = tmp_path / "a" / "b.json"
    write_text(place, "one")
    seen = []

    def stops():
        with new_file(place) as partial:
            partial.write_text("tw")
            seen.append(place.read_text())
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        stops()
    assert seen == ["one"]
    assert place.read_text() == "one"
    write_text(place, "two é")
    assert place.read_text(encoding="utf-8") == "two é"
    assert os.listdir(place.parent) == ["b.json"]


def test_a_private_file_is_nobody_elses_from_the_beginning(tmp_path):
    with new_file(tmp_path / "keys", private=True) as partial:
        assert stat.S_IMODE(partial.stat().st_mode) == 0o600
        partial.write_text("secret")
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o600


def _fill(place, text):
    place.mkdir()
    (place / "x").write_text(text)


def test_a_directory_is_whole_or_as_it_was(tmp_path):
    place = tmp_path / "run" / "data"
    with new_directory(place) as fresh:
        _fill(fresh, "one")

    def stops():
        with new_directory(place, replace=True) as fresh:
            _fill(fresh, "two")
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        stops()
    # There is something, and nobody said replace.
    with pytest.raises(OSError, match="not empty"), new_directory(place) as fresh:
        _fill(fresh, "two")
    assert (place / "x").read_text() == "one"
    with new_directory(place, replace=True) as fresh:
        _fill(fresh, "three")
    assert (place / "x").read_text() == "three"
    assert os.listdir(place.parent) == ["data"]


def test_what_was_there_comes_back_where_the_new_one_cannot_take_its_place(tmp_path):
    place = tmp_path / "data"
    _fill(place, "one")
    with pytest.raises(FileNotFoundError), new_directory(place, replace=True):
        pass  # nothing was made
    assert (place / "x").read_text() == "one"
    assert os.listdir(tmp_path) == ["data"]
