"""Compositions in a catalog: what they come from stays known, what is of another base stays out."""

import json

import numpy as np
import pytest

from popax.adapters.cohort import Cohort
from popax.cli.main import main
from popax.errors import BaseMismatchError
from popax.store import Catalog
from popax.store.compose import Term, compose_revisions


def dense(catalog, user):
    adapter, manifest = catalog.load(user)
    stored = catalog.cohort_of(manifest)
    cohort = Cohort(stored.config, tuple(stored.specs.values()))
    zeros = np.zeros((2, 16, 16), np.float32)
    return {name: np.asarray(cohort.merge(name, zeros, adapter, {})[0]) for name in cohort.specs}


@pytest.fixture
def users(catalog, cohort, make_adapter):
    for seed, user in enumerate(("ada", "bob", "0.5*odd")):
        catalog.commit(cohort, user, make_adapter(seed))
    return catalog


def test_the_command_adds_what_users_have_and_names_them(users, place, tmp_path, capsys):
    told = tmp_path / "told.json"
    assert main(["compose", "--json", str(told), "--", str(place), "blend", "2*ada", "-0.5*bob@1", "0.5*odd"]) == 0
    assert "blend@1: lora of rank 12 made by cat of 'ada'@1, 'bob'@1, '0.5*odd'@1" in capsys.readouterr().out
    catalog = Catalog.open(place)
    got, parts = dense(catalog, "blend"), [dense(catalog, user) for user in ("ada", "bob", "0.5*odd")]
    for name, sum_ in got.items():
        np.testing.assert_allclose(sum_, 2 * parts[0][name] - 0.5 * parts[1][name] + parts[2][name], atol=1e-4)
    _, manifest = catalog.load("blend")
    assert [list(one[:2]) for one in manifest.derived_from] == [["ada", 1], ["bob", 1], ["0.5*odd", 1]]
    assert manifest.provenance["composition"]["terms"] == [["ada", 1, 2.0], ["bob", 1, -0.5], ["0.5*odd", 1, 1.0]]
    assert json.loads(told.read_text())["revision"]["user"] == "blend"
    assert [one.user for one in catalog.tainted("ada")] == ["blend"]


def test_a_rank_says_what_it_leaves_out(users, place, capsys):
    assert main(["compose", str(place), "small", "ada", "bob", "--rank", "4", "--how", "ties"]) == 0
    assert "its rank leaves out" in capsys.readouterr().out
    _, manifest = Catalog.open(place).load("small")
    assert manifest.provenance["composition"]["error"] > 0.01
    assert manifest.config["rank"] == 4


def test_adapters_of_two_bases_are_refused_by_name(users, specs, layout, config, make_adapter):
    other = users.cohort(config, specs, "base-b", layout)
    users.commit(other, "eve", make_adapter(9))
    terms = [Term(manifest) for manifest in users.resolve([("ada", None), ("eve", None)])]
    with pytest.raises(BaseMismatchError, match=r"'ada'@1 of the base base-a, 'eve'@1 of the base base-b"):
        compose_revisions(users, terms, "both")
    assert not users.exists("both")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nobody"], "nobody"),
        (["ada@7"], "ada"),
        (["base", "ada"], "the base is no adapter"),
        (["ada", "--rank", "17"], "rank=17"),
        (["ada", "bob", "--how", "linear"], "not linear"),
        (["ada", "--how", "dare", "--density", "0"], "density=0.0"),
        (["inf*ada"], "inf*ada"),
    ],
)
def test_bad_input_is_one_line(users, place, capsys, arguments, words):
    assert main(["compose", str(place), "blend", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("error: ")
    assert not Catalog.open(place).exists("blend")


def test_interference_of_all_users(users, place, tmp_path, capsys):
    told, matrix = tmp_path / "told.json", tmp_path / "cosine.npy"
    assert main(["users", "interference", str(place), "--json", str(told), "--matrix", str(matrix)]) == 0
    names = ["0.5*odd", "ada", "bob"]
    flat = np.stack([np.concatenate([w.ravel() for w in dense(users, user).values()]) for user in names])
    want = flat @ flat.T / np.outer(*[np.linalg.norm(flat, axis=1)] * 2)
    np.testing.assert_allclose(np.load(matrix), want, atol=1e-5)
    report = json.loads(told.read_text())
    assert report["figures"]["users"] == 3
    first = report["rows"][0]
    assert abs(first["cosine"]) == pytest.approx(np.max(np.abs(want - np.eye(3))), abs=1e-5)
    assert "3 users in" in capsys.readouterr().out


def test_interference_needs_two_of_one_cohort(users, specs, layout, config, make_adapter, place, capsys):
    assert main(["users", "interference", str(place), "--prefix", "ada"]) == 2
    assert "at least two" in capsys.readouterr().err
    users.commit(users.cohort(config, specs, "base-b", layout), "eve", make_adapter(9))
    assert main(["users", "interference", str(place)]) == 2
    assert "--cohort" in capsys.readouterr().err
