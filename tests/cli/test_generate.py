"""`popax generate`: several users in one batch, and the road to the end: users, history, PEFT."""

import json
import shutil

import jax
import numpy as np
import pytest

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.cli.main import main
from popax.data.tokenize import load_tokenizer
from popax.evaluation.dispatch import by_prompt
from popax.modeling.base import load_base
from popax.store.catalog import Catalog
from popax.store.layout import RowLayout


def generate(world, path, *more, catalog=None):
    arguments = ["generate", "--base", world.base, "--catalog", str(catalog or world.catalog), "--json", str(path)]
    arguments += ["--revision", "latest"]
    code = main([*arguments, "--max_new_tokens", "6", *more])
    return json.loads(path.read_text()) if code == 0 else code


@pytest.fixture(scope="module")
def loud(world, tmp_path_factory):
    """A catalog whose users differ loudly, one of them twice, one of another cohort, one with a revision-like id."""
    place = tmp_path_factory.mktemp("loud") / "catalog"
    base, catalog = load_base(world.base), Catalog.open(place, create=True)

    def commit(user, seed, rank=2):
        cohort = Cohort.of(AdapterConfig(rank=rank), base.model.sites())
        stored = catalog.cohort(cohort.config, cohort.specs, base.digest, RowLayout.of(cohort.abstract()))
        rng = np.random.default_rng(seed)
        fill = lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype)  # noqa: E731
        catalog.commit(stored, user, jax.tree.map(fill, cohort.abstract()))

    for seed, user in enumerate(["ada", "ada", "bob", "eve@7", "base"]):
        commit(user, seed)
    commit("other", 9, rank=3)
    return place


def test_every_row_is_its_users_own(world, loud, tmp_path, capsys):
    rows = generate(
        world, tmp_path / "all.json", *["--prompt", "abc"], *flags("ada", "bob", "ada@1", "base", "eve@7"), catalog=loud
    )
    assert [(row["name"], row["revision"]) for row in rows] == [
        ("ada@2", 2),
        ("bob@1", 1),
        ("ada@1", 1),
        ("base", None),
        ("eve@7@1", 1),
    ]
    assert len({tuple(row["tokens"]) for row in rows}) > 1
    assert capsys.readouterr().out.startswith("[ada@2] abc")
    for name, row in zip(["ada", "bob", "ada@1", "base", "eve@7@1"], rows, strict=True):
        (alone,) = generate(world, tmp_path / "one.json", "--prompt", "abc", "--user", name, catalog=loud)
        assert alone["tokens"] == row["tokens"], name
    # A user who is called "base" is named with a revision.
    (user,) = generate(world, tmp_path / "one.json", "--prompt", "abc", "--user", "base@1", catalog=loud)
    assert user["name"] == "base@1"


def flags(*users):
    return [part for user in users for part in ("--user", user)]


def test_the_base_alone_needs_no_catalog(world, tmp_path):
    arguments = ["generate", "--base", world.base, "--prompt", "", "--max_new_tokens", "4"]
    assert main([*arguments, "--json", str(tmp_path / "a.json")]) == 0
    (row,) = json.loads((tmp_path / "a.json").read_text())
    assert (row["name"], row["revision"]) == ("base", None)


def test_a_seed_gives_the_same_sample_and_another_seed_another(world, loud, tmp_path):
    def tokens(seed):
        sampled = ["--temperature", "2.0", "--seed", str(seed), "--prompt", "ab", "--user", "ada"]
        return generate(world, tmp_path / "s.json", *sampled, "--max_new_tokens", "16", catalog=loud)[0]["tokens"]

    assert tokens(1) == tokens(1)
    assert len({tuple(tokens(seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--user", "zed"], "'zed'"),
        (["--user", "ada@9"], "no revision 9"),
        (["--user", "ada", "--user", "other"], "different cohorts"),
        (["--user", "ada", "--prompt", "b", "--prompt", "c"], "3 prompts for 1 users"),
        (["--user", "ada", "--temperature", "-1"], "temperature=-1.0"),
        (["--user", "ada", "--max_new_tokens", "0"], "max_new_tokens=0"),
        (["--user", "ada", "--max_new_tokens", "100"], "max_seq_len=64"),
    ],
)
def test_what_is_wrong_is_one_line(world, loud, tmp_path, capsys, more, words):
    assert generate(world, tmp_path / "x.json", "--prompt", "abc", *more, catalog=loud) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


def test_a_user_without_a_catalog_and_an_adapter_of_another_base_are_refused(world, loud, tmp_path, capsys):
    assert main(["generate", "--base", world.base, "--prompt", "a", "--user", "ada"]) == 2
    assert "needs --catalog" in capsys.readouterr().err
    assert main(world.pretrain(tmp_path / "other", "--gin_param", "PretrainConfig.steps=3")) == 0
    capsys.readouterr()
    base = str(tmp_path / "other" / "base")
    assert main(["generate", "--base", base, "--catalog", str(loud), "--prompt", "a", "--user", "ada@latest"]) == 2
    assert "was made for the base" in capsys.readouterr().err


def test_a_candidate_is_not_served_unless_it_is_asked_for(world, loud, capsys):
    arguments = ["generate", "--base", world.base, "--catalog", str(loud), "--prompt", "a", "--max_new_tokens", "4"]
    assert main([*arguments, "--user", "ada"]) == 2
    assert "'ada' has no promoted revision" in capsys.readouterr().err
    assert main([*arguments, "--user", "ada@latest"]) == 0


def test_a_damaged_revision_is_named(world, tmp_path, capsys):
    catalog = tmp_path / "catalog"
    shutil.copytree(world.catalog, catalog)
    for path in sorted(catalog.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)[-3:]:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 0xFF
        path.write_bytes(raw)
    assert (
        generate(world, tmp_path / "x.json", "--prompt", "a", *flags(*[f"u0{i}" for i in range(5)]), catalog=catalog)
        == 2
    )
    assert capsys.readouterr().err.startswith("error: ")


def test_the_road_to_its_end(world, tmp_path, capsys):
    """A trained user is listed, has a history, generates, and leaves as a PEFT directory."""
    assert main(["users", "list", world.catalog]) == 0
    assert "u00@1" in capsys.readouterr().out
    assert main(["users", "history", world.catalog, "u00"]) == 0
    assert "validation_loss=" in capsys.readouterr().out
    rows = generate(world, tmp_path / "g.json", "--prompt", "ab", *flags("u00", "u01", "base"))
    assert [row["name"] for row in rows] == ["u00@1", "u01@1", "base"]
    assert main(["extract", world.catalog, "u00", str(tmp_path / "peft")]) == 0
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()
    assert main(["extract", str(world.run / "shared"), "everyone", str(tmp_path / "everyone")]) == 0


def test_the_base_is_asked_which_expert_continues_a_prompt(world, tmp_path, capsys):
    path = tmp_path / "rows.json"
    question = "{text}:{labels}:"
    experts = ["--expert", "pea=u00@latest", "--expert", "car=u01@latest", "--question", question]
    arguments = ["generate", "--base", world.base, "--catalog", world.catalog, "--max_new_tokens", "3"]
    assert main([*arguments, *experts, "--prompt", "a", "--prompt", "b", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [row["prompt"] for row in rows] == ["a", "b"]
    base, tokenizer = load_base(world.base), load_tokenizer(world.base)
    asked = [by_prompt(base, tokenizer, text, ["pea", "car"], question) for text in ("a", "b")]
    wanted = [("u00@1", "u01@1")[int(logps.argmax())] for logps in asked]
    assert [row["name"] for row in rows] == wanted
    assert main([*arguments, *experts, "--user", "u00", "--prompt", "a"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert main([*arguments, *experts[:-1], "{text}", "--prompt", "a"]) == 2
    assert "{labels}" in capsys.readouterr().err
    assert main([*arguments, "--expert", "pea", "--expert", "x=u01", "--prompt", "a"]) == 2
    assert "LABEL=WHO" in capsys.readouterr().err
