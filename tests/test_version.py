"""The version that manifests carry: the package's, and the commit where there is one."""

import subprocess

import pytest

import popax
from popax import version


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of one commit, in which popax seems to lie."""
    (tmp_path / "popax").mkdir()
    (tmp_path / "popax" / "__init__.py").write_text("")
    monkeypatch.setattr(popax, "__file__", str(tmp_path / "popax" / "__init__.py"))

    def git(*arguments):
        made = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
        return subprocess.run(made, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "one")
    return tmp_path, git("rev-parse", "--short=12", "HEAD")


def test_outside_a_checkout_it_is_the_package_version(tmp_path, monkeypatch):
    monkeypatch.setattr(popax, "__file__", str(tmp_path / "popax" / "__init__.py"))
    assert version.commit() == f"popax {popax.__version__}"
    assert version.code_version.__wrapped__() == popax.__version__


def test_in_a_checkout_it_names_the_commit_and_whether_files_were_changed(checkout):
    folder, head = checkout
    assert version.commit() == head
    assert version.code_version.__wrapped__() == f"{popax.__version__}+{head}"
    (folder / "popax" / "__init__.py").write_text("changed")
    assert version.commit() == f"{head}+changed"
    assert version.code_version.__wrapped__() == f"{popax.__version__}+{head}.changed"
