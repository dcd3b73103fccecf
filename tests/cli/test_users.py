"""`popax users ...`: each command says what it found or did, as text and as JSON."""

import json

import jax
import pyarrow.parquet as pq
import pytest

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.cli.main import main
from popax.store.catalog import Catalog
from popax.store.database import Database
from popax.store.layout import RowLayout
from popax.store.records import row_key
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


def _json(path):
    return json.loads(path.read_text())


def test_users_are_listed(catalog, capsys, tmp_path):
    out = tmp_path / "users.json"
    assert main(["users", "list", catalog, "--json", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [r"'\x1b[31mred'@1", "ada@2", "bob@1"]
    assert [(one["user"], one["latest"], one["promoted"]) for one in _json(out)] == [
        ("\x1b[31mred", 1, None),
        ("ada", 2, None),
        ("bob", 1, None),
    ]
    assert main(["users", "list", catalog, "--prefix", "b"]) == 0
    assert capsys.readouterr().out == "bob@1\n"
    assert main(["users", "list", catalog, "--status", "promoted", "--json", str(out)]) == 0
    assert capsys.readouterr().out == ""
    assert _json(out) == []


def test_a_users_revisions_are_listed_oldest_first(catalog, capsys, tmp_path):
    assert main(["users", "history", catalog, "ada", "--json", str(tmp_path / "history.json")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("ada@1  ")
    assert second.startswith("ada@2 after @1  ")
    assert "lora rank 2" in second
    assert second.endswith("loss=0.3333")
    assert [record["revision"] for record in _json(tmp_path / "history.json")] == [1, 2]


def test_tags_and_rollback_move_pointers(catalog, capsys, tmp_path):
    out = tmp_path / "record.json"
    assert main(["users", "tag", catalog, "ada", "early", "--revision", "1", "--json", str(out)]) == 0
    assert _json(out)["tags"] == {"early": 1}
    opened = Catalog.open(catalog)
    for revision in (1, 2):
        opened.promote("ada", revision)
    assert main(["users", "rollback", catalog, "ada", "--json", str(out)]) == 0
    assert _json(out)["promoted"] == 1
    assert main(["users", "tag", catalog, "ada", "early", "--remove"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ada@2, promoted @1"


def test_a_difference_is_told_site_by_site(catalog, capsys, tmp_path):
    assert main(["users", "diff", catalog, "ada", "1", "--json", str(tmp_path / "diff.json")]) == 0
    text = capsys.readouterr().out
    assert "'ada'@1 -> 'ada'@2" in text
    assert "metrics.loss: 1.0 -> 0.3333" in text
    assert [site["site"] for site in _json(tmp_path / "diff.json")["sites"]] == ["layers.attn.q_proj"]


def test_deletion_asks_and_says_what_it_taints(catalog, capsys, tmp_path):
    opened = Catalog.open(catalog)
    adapter, manifest = opened.load("ada")
    opened.commit(opened.cohort_of(manifest), "merged", adapter, derived_from=[("ada", 2)])
    assert main(["users", "delete", catalog, "ada"]) == 2
    assert "--yes" in capsys.readouterr().err
    assert main(["users", "delete", catalog, "ada", "--yes", "--json", str(tmp_path / "gone.json")]) == 0
    assert "merged@1 was derived from ada@2" in capsys.readouterr().out
    [gone] = _json(tmp_path / "gone.json")
    assert (gone["revisions"], gone["tainted"][0]["user"]) == (2, "merged")
    assert main(["users", "tainted", catalog, "ada"]) == 0
    assert capsys.readouterr().out == "merged@1 was derived from ada@2\n"
    assert not Catalog.open(catalog).exists("ada")


def test_pruning(catalog, capsys):
    assert main(["users", "prune", catalog, "ada", "--before", "2"]) == 0
    assert [manifest.revision for manifest in Catalog.open(catalog).history("ada")] == [2]
    assert main(["users", "prune", catalog, "ada", "--before", "3"]) == 2
    assert "is the latest" in capsys.readouterr().err


def test_garbage_is_collected(catalog, capsys, tmp_path):
    before = sum(path.stat().st_size for path in (tmp_path / "catalog").rglob("*") if path.is_file())
    assert main(["users", "delete", catalog, "ada", "--yes"]) == 0
    assert main(["users", "gc", catalog, "--grace", "0", "--json", str(tmp_path / "gc.json")]) == 0
    assert "files removed" in capsys.readouterr().out
    assert 0 < _json(tmp_path / "gc.json")["bytes_left"] < before


def test_cold_users_are_compressed(catalog, capsys, tmp_path):
    out = tmp_path / "compressed.json"
    assert main(["users", "compress", catalog, "--prefix", "b", "--max_error", "0.5", "--json", str(out)]) == 0
    assert capsys.readouterr().out.startswith("1 of 1 users compressed: ")
    [one] = _json(out)
    assert (one["user"], one["source"], one["revision"]) == ("bob", 1, 2)
    assert 0 < one["error"] < 0.5
    assert main(["users", "compress", catalog, "--prefix", "a", "--max_error", "0"]) == 0
    assert "ada@2 is left as it is: error 0.0" in capsys.readouterr().out
    assert main(["users", "compress", catalog, "--max_error", "-1"]) == 2


def test_an_audit_says_by_its_exit_code_whether_all_is_well(catalog, capsys, tmp_path):
    out = tmp_path / "audit.json"
    assert main(["users", "verify", catalog, "--json", str(out)]) == 0
    assert (_json(out)["clean"], _json(out)["users"], _json(out)["revisions"]) == (True, 3, 4)
    opened = Catalog.open(catalog)
    manifest = opened.load("ada")[1]
    store = Database.open(catalog, create=False).kvstore
    store.write(row_key(manifest.cohort, manifest.row), b"short").result()
    capsys.readouterr()
    assert main(["users", "verify", catalog, "--json", str(out)]) == 1
    assert "ada@2: the row of 'ada'@2 is corrupt" in capsys.readouterr().out
    assert main(["users", "verify", catalog, "bob"]) == 0
    assert main(["users", "verify", catalog, "nobody"]) == 1


def test_counts_and_parquet(catalog, capsys, tmp_path):
    assert main(["users", "stat", catalog, "--json", str(tmp_path / "stat.json")]) == 0
    assert _json(tmp_path / "stat.json")["revisions"] == 4
    target = tmp_path / "revisions.parquet"
    assert main(["users", "export", catalog, str(target), "--prefix", "a"]) == 0
    assert capsys.readouterr().out.endswith(f"2 revisions in {target}\n")
    assert pq.read_table(target)["revision"].to_pylist() == [1, 2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["history", "{catalog}", "eve"],
        ["list", "{missing}"],
        ["diff", "{catalog}", "ada", "7"],
        ["rollback", "{catalog}", "ada"],
        ["tag", "{catalog}", "ada", "latest"],
        ["delete", "{catalog}", "eve", "--yes"],
        ["list", "{catalog}", "--since", "tomorrow"],
    ],
)
def test_what_cannot_be_is_one_line(catalog, tmp_path, capsys, arguments):
    filled = [argument.format(catalog=catalog, missing=tmp_path / "missing") for argument in arguments]
    assert main(["users", *filled]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
