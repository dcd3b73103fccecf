"""`popax remember`: a revision that has read a text, from the shell to what `popax generate` says with it."""

import json

import numpy as np
import pytest

from popax.cli.main import main
from popax.modeling.base import save_base
from popax.store.catalog import Catalog
from popax.version import code_version
from tests.serving.world import COHORTS, World

MEMORY = COHORTS[-1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base on disk, and two users: `memory` has one, `plain` has none."""
    folder = tmp_path_factory.mktemp("remember")
    world = World.make(folder / "catalog", users=0)
    world.commit("memory", MEMORY, np.random.default_rng(1))
    world.commit("plain", COHORTS[0], np.random.default_rng(1))
    save_base(folder / "base", world.base)
    world.tokenizer.save(str(folder / "base"))
    return folder


def remember(place, user, *arguments):
    return main(["remember", str(place / "catalog"), user, "--base", str(place / "base"), *arguments])


def says(place, who, tmp_path):
    out = tmp_path / "said.json"
    command = ["generate", "--base", str(place / "base"), "--catalog", str(place / "catalog"), "--user", who]
    assert main([*command, "--prompt", "ab", "--max_new_tokens", "24", "--json", str(out)]) == 0
    return json.loads(out.read_text())[0]["tokens"]


def test_a_revision_that_has_read_says_something_else_and_forgets_it(place, tmp_path, capsys):
    file, record = tmp_path / "talk.txt", tmp_path / "made.json"
    file.write_text("a talk about kernels, " * 20)  # more than the context of 128
    assert remember(place, "memory@1", "--file", str(file), "--json", str(record)) == 0
    said = capsys.readouterr().out
    assert "'memory'@2: 'memory'@1 with what is left of" in said
    made = json.loads(record.read_text())["revision"]
    assert made["derived_from"][0][:2] == ["memory", 1]
    assert made["provenance"]["remembered"]["tokens"] >= 20 * 22
    assert made["version"] == code_version()
    assert remember(place, "memory", "--forget") == 0
    catalog = Catalog.open(str(place / "catalog"), read_only=True)
    first, read, forgot = (catalog.load("memory", at)[0]["layers.out"] for at in (1, 2, 3))
    assert not np.any(forgot["start"])
    assert np.any(read["start"] != first["start"])
    for leaf in ("gain", "gate"):
        np.testing.assert_array_equal(read[leaf], first[leaf])
        np.testing.assert_array_equal(forgot[leaf], first[leaf])
    assert says(place, "memory@2", tmp_path) != says(place, "memory@3", tmp_path)


@pytest.mark.parametrize(
    ("user", "arguments", "words"),
    [
        ("plain", ("--text", "a"), "remembers nothing"),
        ("nobody", ("--text", "a"), "nobody"),
        ("base", ("--text", "a"), "base remembers nothing"),
        ("memory", ("--text", ""), "empty"),
        ("memory", ("--file", "no/such/file"), "no/such/file"),
    ],
)
def test_bad_input_is_one_line(place, capsys, user, arguments, words):
    assert remember(place, user, *arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
