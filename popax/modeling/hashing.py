"""The hash of every stored tensor: made once, while the weights are read, shared out over processes, and noted.

A base's digest is over the hashes of all of its tensors, and a process that reads its shard does not read all of them.
So each process hashes a share, they tell each other, and the first of them notes the hashes beside the files, with the
files' sizes and times of change. As long as these are the same the notes are believed and nothing is hashed.
"""

import contextlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from popax.atomic import write_text
from popax.distributed.group import ProcessGroup
from popax.modeling.tensor_files import StoredTensor

NOTES = "popax_digests.json"
FORMAT = 1
# Less than this is hashed again each time: no second file is worth so little.
NOTED_FROM_BYTES = 1 << 28
# A file that is written again within a tick of the file system's clock does not show it: only older ones are noted.
SETTLED_NS = 2_000_000_000


class Hashing:
    """The sha256 of these tensors, hashed on the threads that read them; a context that ends them.

    All processes of the group make one together, of equal tensors, and call `finish` together.
    """

    def __init__(self, directory: Path, tensors: Sequence[StoredTensor], group: ProcessGroup, *, verify: bool = False):
        self.pool = ThreadPoolExecutor(thread_name_prefix="weights")
        self.group, self._directory = group, directory
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._files = _fingerprints(tensor.file for tensor in tensors)
        self._noted = None if verify else _read_notes(directory, self._files, self._tensors)
        self._hashes: dict[str, Future[str]] = {}
        if group.any_of(self._noted is None):
            self._noted = None
        by_size = sorted(self._tensors.values(), key=lambda tensor: (-tensor.nbytes, tensor.name))
        self._share = set() if self._noted is not None else {t.name for t in by_size[group.index :: group.count]}

    def __enter__(self) -> "Hashing":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def begin(self, tensors: Iterable[StoredTensor]) -> None:
        """Hash those of these tensors that are this process's share, beside whatever reads them now."""
        for tensor in tensors:
            if tensor.name in self._share and tensor.name not in self._hashes:
                self._hashes[tensor.name] = self.pool.submit(tensor.sha256)

    def finish(self) -> dict[str, str]:
        """{tensor: sha256} of all, once every process has hashed its share."""
        if self._noted is not None:
            return self._noted
        self.begin(self._tensors.values())
        mine = {name: future.result() for name, future in self._hashes.items()}
        hashes = {name: sha256 for part in self.group.gather(mine) for name, sha256 in part.items()}
        if self.group.leads and sum(tensor.nbytes for tensor in self._tensors.values()) >= NOTED_FROM_BYTES:
            _write_notes(self._directory, self._files, hashes)
        return hashes


def _fingerprints(files: Iterable[Path]) -> dict[str, list[int]]:
    """{file's name: [size, time of its last change in ns]}."""
    found = {}
    for file in sorted(set(files)):
        status = file.stat()
        found[file.name] = [status.st_size, status.st_mtime_ns]
    return found


def _read_notes(directory: Path, files: dict[str, list[int]], tensors: Mapping[str, Any]) -> dict[str, str] | None:
    """The noted hashes of these tensors; None where they are not all there, or the files are others by now."""
    try:
        notes = json.loads((directory / NOTES).read_text(encoding="utf-8"))
        known = notes["format"] == FORMAT and all(notes["files"].get(name) == mark for name, mark in files.items())
        return {name: str(notes["sha256"][name]) for name in tensors} if known else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # what cannot be read is made again


def _write_notes(directory: Path, files: dict[str, list[int]], hashes: Mapping[str, str]) -> None:
    """Note the hashes, unless a file has changed meanwhile or is too young to tell, or nothing can be written."""
    changed = _fingerprints(directory / name for name in files) != files
    if changed or max(mark[1] for mark in files.values()) > time.time_ns() - SETTLED_NS:
        return
    with contextlib.suppress(OSError):  # somebody else's directory: it is hashed again next time
        write_text(directory / NOTES, json.dumps({"format": FORMAT, "files": files, "sha256": hashes}, indent=0))
