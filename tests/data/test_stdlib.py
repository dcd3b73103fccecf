"""The standard library as a corpus: deterministic, enough users, nothing lost in cutting."""

from pathlib import Path

import pytest

from popax.data.stdlib import num_bytes, split_corpus, split_definitions, standard_library


@pytest.fixture(scope="module")
def corpus():
    return standard_library()


def test_there_are_enough_users(corpus):
    assert sum(num_bytes(documents) >= 20_000 for documents in corpus.values()) >= 64
    users, base = split_corpus(corpus, 64)
    assert len(users) == 64
    assert not set(users) & set(base)
    assert set(users) | set(base) == set(corpus)
    assert min(num_bytes(documents) for documents in users.values()) >= 20_000
    assert all(len(documents) >= 3 for documents in users.values())
    capped = split_corpus(corpus, 64, max_bytes=150_000)
    assert len(capped.users) == 64
    assert max(num_bytes(documents) for documents in capped.users.values()) <= 150_000
    assert sum(map(num_bytes, capped.base.values())) > sum(map(num_bytes, base.values()))


def test_no_tests_no_duplicates_and_a_stable_order(corpus):
    names = [name for documents in corpus.values() for name, _ in documents]
    assert len(set(names)) == len(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/")[:-1])]
    assert "json" in corpus
    assert "argparse" in corpus
    assert list(corpus) == sorted(corpus)
    order = [name for name, _ in corpus["email"]]
    assert order != sorted(order)
    assert standard_library(min_bytes=20_000) == {
        group: documents for group, documents in corpus.items() if num_bytes(documents) >= 20_000
    }


def test_a_large_module_becomes_several_documents(corpus):
    pieces = dict(corpus["argparse"])
    assert len(pieces) >= 10
    source = Path(__import__("argparse").__file__).read_text(encoding="utf-8")
    assert "".join(pieces[f"argparse.py#{i}"] for i in range(len(pieces))) == source


def test_pieces_join_to_the_source():
    for name in ("argparse", "decimal", "typing", "enum", "dataclasses"):
        source = Path(__import__(name).__file__).read_text(encoding="utf-8")
        assert "".join(split_definitions(source)) == source
    pieces = [
        "import os\n\n",
        "# about f\n@cached\ndef f():\n    return 1\n\n",
        "class Long:\n",
        "    def g(self):\n        pass\n\n",
        "    def h(self):\n        pass\n",
    ]
    assert split_definitions("".join(pieces), 10) == pieces
    assert split_definitions("def broken(:\n") == ["def broken(:\n"]
    assert split_definitions("") == [""]


def test_another_root(tmp_path):
    (tmp_path / "pkg" / "tests").mkdir(parents=True)
    (tmp_path / "pkg" / "a.py").write_text("x = 1\n")
    (tmp_path / "pkg" / "tests" / "b.py").write_text("y = 2\n")
    (tmp_path / "mod.py").write_text("z = 3\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe5\n")
    assert standard_library(root=tmp_path) == {"mod": [("mod.py#0", "z = 3\n")], "pkg": [("pkg/a.py#0", "x = 1\n")]}
