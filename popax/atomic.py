"""Files and directories that are whole or absent: written beside their place, then renamed into it."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str], *, private: bool = False) -> Iterator[Path]:
    """A path to write to, beside `path`, whose folders are made; after the block it is `path`, in place of what was
    there. A block that raises leaves nothing. private: readable by the owner alone, from the beginning."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        if private:
            partial.touch(mode=0o600)
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str, *, private: bool = False) -> None:
    """`new_file` with this text, in UTF-8."""
    with new_file(path, private=private) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """A path for a directory, which the block makes, beside `path`; after the block it is `path`.

    replace: in place of what is there, which a kill between the two renames leaves under another name: only for what
    can be made again. Without it an OSError where a directory with files is. A block that raises leaves what was there.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (target.with_name(f".{target.name}.{uuid.uuid4().hex}.{role}") for role in ("partial", "old"))
    try:
        yield fresh
        if replace and target.exists():
            os.rename(target, old)
        try:
            os.rename(fresh, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
    finally:
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
