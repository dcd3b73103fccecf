"""The running interpreter's standard library as a corpus of users: every machine with Python has it."""

import ast
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

Documents = list[tuple[str, str]]  # (name, text)

SKIPPED = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "lib-dynload",
        "ensurepip",
        "__phello__",
    }
)
FEW_FILES = 8  # a group of fewer files is cut into pieces, so that it has past and held-out documents too
PIECE_BYTES = 2048


class Corpus(NamedTuple):
    """users: group -> documents, for the population. base: the same for every other group, to pretrain on."""

    users: dict[str, Documents]
    base: dict[str, Documents]


def standard_library(min_bytes: int = 0, root: str | Path | None = None) -> dict[str, Documents]:
    """Group -> documents, for every package or top-level module of at least min_bytes of source.

    A document is a file, or about 2 KB of whole definitions where the group has few files. Tests are left out. The
    order of documents is by hash of their name: neither alphabetical nor in time. root: the library's folder, by
    default the running interpreter's.
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    groups: dict[str, list[tuple[str, str]]] = {}
    for path in _source_files(root):
        text = _read(path)
        if text:
            name = path.relative_to(root).as_posix()
            groups.setdefault(path.relative_to(root).parts[0].removesuffix(".py"), []).append((name, text))
    corpus = {}
    for group, files in sorted(groups.items()):
        if sum(len(text.encode()) for _, text in files) >= min_bytes:
            documents = files if len(files) >= FEW_FILES else [piece for file in files for piece in _pieces(*file)]
            corpus[group] = sorted(documents, key=lambda document: hashlib.sha256(document[0].encode()).digest())
    return corpus


def split_corpus(groups: Mapping[str, Documents], num_users: int, max_bytes: int | None = None) -> Corpus:
    """users: the num_users groups with the most text among those of at most max_bytes; base: all others.

    A user has at least 3 documents, for past, validation and future. max_bytes leaves the largest packages, and with
    them most of the text, to the base.
    """
    sizes = {group: num_bytes(documents) for group, documents in groups.items()}
    usable = [g for g, documents in groups.items() if len(documents) >= 3 and (not max_bytes or sizes[g] <= max_bytes)]
    chosen = set(sorted(usable, key=lambda group: (-sizes[group], group))[:num_users])
    return Corpus(
        {group: documents for group, documents in groups.items() if group in chosen},
        {group: documents for group, documents in groups.items() if group not in chosen},
    )


def num_bytes(documents: Documents) -> int:
    """UTF-8 bytes of all texts."""
    return sum(len(text.encode()) for _, text in documents)


def split_definitions(source: str, piece_bytes: int = PIECE_BYTES) -> list[str]:
    """Source cut before definitions into pieces of about piece_bytes; joined they are the source again.

    A class too long for one piece is cut before its methods. A single longer definition stays whole, as does source
    that does not parse.
    """
    lines = source.splitlines(keepends=True)
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return [source]
    if len(lines) != source.count("\n") + (not source.endswith("\n")):
        return [source]  # a form feed inside: Python and str.splitlines count lines differently
    pieces, start = [], 0
    for cut in [*_cuts(tree.body, lines, piece_bytes), len(lines)]:
        text = "".join(lines[start:cut])
        if len(text.encode()) >= piece_bytes or cut == len(lines):
            pieces.append(text)
            start = cut
    if len(pieces) > 1 and len(pieces[-1].encode()) < piece_bytes // 2:
        tail = pieces.pop()
        pieces[-1] += tail
    return [piece for piece in pieces if piece]


def _cuts(body: list[ast.stmt], lines: list[str], piece_bytes: int) -> Iterator[int]:
    """Line indices before which a definition starts, its decorators and comments included."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        while first and lines[first - 1].lstrip().startswith("#"):
            first -= 1
        yield first
        size = sum(len(line.encode()) for line in lines[first : node.end_lineno])
        if isinstance(node, ast.ClassDef) and size > 2 * piece_bytes:
            yield from (cut for cut in _cuts(node.body, lines, piece_bytes) if cut > first)


def _pieces(name: str, text: str) -> Documents:
    return [(f"{name}#{number}", piece) for number, piece in enumerate(split_definitions(text))]


def _source_files(root: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if name not in SKIPPED and not name.startswith("config-"))
        yield from (Path(folder) / name for name in sorted(files) if name.endswith(".py"))


def _read(path: Path) -> str:
    """The file's text; empty where it is not UTF-8 or cannot be read (a broken link, for instance)."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
