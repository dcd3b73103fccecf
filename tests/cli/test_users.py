"""`popax users` lists users and revisions, and says when there are none."""

import json

import jax
import pytest

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.cli.main import main
from popax.store.catalog import Catalog
from popax.store.layout import RowLayout
from popax.types import SiteInfo


@pytest.fixture
def catalog(tmp_path):
    site = SiteInfo(name="layers.attn.q_proj", d_in=8, d_out=8, layers=2, axes=("embed", "heads"))
    cohort = Cohort.of(AdapterConfig(rank=2, targets=(site.name,)), {site.name: site})
    catalog = Catalog.open(tmp_path / "catalog", create=True)
    stored = catalog.cohort(cohort.config, cohort.specs, "base-digest", RowLayout.of(cohort.abstract()))
    for index, user in enumerate(["ada", "bob", "ada", "\x1b[31mred"]):
        catalog.commit(stored, user, cohort.init(jax.random.key(index)), metrics={"loss": 1.0 / (index + 1)})
    return str(tmp_path / "catalog")


def test_users_are_listed(catalog, capsys):
    assert main(["users", catalog]) == 0
    assert capsys.readouterr().out.splitlines() == [r"'\x1b[31mred'@1", "ada@2", "bob@1"]
    assert main(["users", catalog, "--prefix", "b"]) == 0
    assert capsys.readouterr().out == "bob@1\n"


def test_a_users_revisions_are_listed_oldest_first(catalog, capsys, tmp_path):
    assert main(["users", catalog, "ada", "--json", str(tmp_path / "history.json")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("ada@1  ")
    assert second.startswith("ada@2 after @1  ")
    assert "lora rank 2" in second
    assert second.endswith("loss=0.3333")
    assert [record["revision"] for record in json.loads((tmp_path / "history.json").read_text())] == [1, 2]


@pytest.mark.parametrize("arguments", [["{catalog}", "eve"], ["{missing}"]])
def test_what_is_not_there_is_one_line(catalog, tmp_path, capsys, arguments):
    filled = [argument.format(catalog=catalog, missing=tmp_path / "missing") for argument in arguments]
    assert main(["users", *filled]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
