"""Which code this is: what manifests, scores and reports say that they were made by."""

import functools
import subprocess
from pathlib import Path

import popax


def commit() -> str:
    """The checkout's commit, `+changed` where tracked files differ from it; the package's version elsewhere."""
    return _head() or f"popax {popax.__version__}"


@functools.cache
def code_version() -> str:
    """The package's version, with the commit (and `.changed`) as its local part where it runs from a checkout."""
    head = _head()
    return popax.__version__ if head is None else f"{popax.__version__}+{head.replace('+', '.')}"


def _head() -> str | None:
    root = Path(popax.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+changed" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()
