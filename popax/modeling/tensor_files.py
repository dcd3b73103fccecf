"""Tensors in safetensors files, read slice by slice; nothing is held that was not asked for.

The format is 8 bytes of header length (little endian), a JSON header {name: {dtype, shape, data_offsets}}, the data.
It is read here rather than through the safetensors package because slices of bfloat16 are wanted as numpy arrays,
and because a damaged file is to be reported with its sizes.
"""

import dataclasses
import hashlib
import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from popax.errors import CheckpointError

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,  # with factors beside it: block_scaled.py
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
HASH_CHUNK_BYTES = 1 << 22


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies. dtype is the format's word, such as BF16."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def stored(self) -> tuple["StoredTensor", ...]:
        """What of the files this tensor is made of."""
        return (self,)

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """A view of this slice of the file, of which the rows are mapped for as long as the view is there."""
        rows, *others = index
        start, stop, _ = rows.indices(self.shape[0])
        dtype, row = np.dtype(DTYPES[self.dtype]), self.shape[1:]
        row_bytes = dtype.itemsize * math.prod(row)
        offset = self.offset + start * row_bytes
        page = offset % mmap.ALLOCATIONGRANULARITY
        try:
            with self.file.open("rb", buffering=0) as stream:
                length = page + (stop - start) * row_bytes
                mapped = mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_READ, offset=offset - page)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.file} changed while {self.name} was read ({error}); load it again") from error
        mapped.madvise(mmap.MADV_WILLNEED)  # one large request, not one for each few pages that are touched
        return np.frombuffer(mapped, dtype, offset=page).reshape(-1, *row)[(slice(None), *others)]

    def sha256(self) -> str:
        """Of the bytes as stored."""
        digest, left = hashlib.sha256(), self.nbytes
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            while left:
                chunk = stream.read(min(left, HASH_CHUNK_BYTES))
                if not chunk:
                    raise CheckpointError(f"{self.file} ended {left} bytes early while {self.name} was read")
                digest.update(chunk)
                left -= len(chunk)
        return digest.hexdigest()


def open_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory with one safetensors file, or several and an index; headers are read, data is not.

    Raises CheckpointError for a missing, truncated or damaged file, and where the index and the files disagree.
    """
    index_path = directory / INDEX
    if not index_path.exists():
        if not (directory / SINGLE).exists():
            raise CheckpointError(
                f"{directory} holds neither {SINGLE} nor {INDEX}; other formats are converted by transformers: "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )
        return read_header(directory / SINGLE)
    weight_map = _weight_map(index_path)
    absent = sorted({name for name in weight_map.values() if not (directory / name).is_file()})
    if absent:
        raise CheckpointError(f"{index_path} names files that are not there: {', '.join(absent)}; download them")
    files = {name: read_header(directory / name) for name in sorted(set(weight_map.values()))}
    misplaced = sorted(name for name, file in weight_map.items() if name not in files[file])
    if misplaced:
        raise CheckpointError(f"{index_path} places tensors in files that lack them: {', '.join(misplaced[:5])}")
    return {name: tensor for file in files.values() for name, tensor in file.items()}


def _weight_map(index_path: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index_path} is not an index with a weight_map ({error!r}); download it") from error
    outside = [name for name in weight_map.values() if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index_path} names files outside its directory: {outside[0]!r}")
    return weight_map


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises CheckpointError where the file is shorter or longer than its header says."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
            raise CheckpointError(
                f"{path} is truncated or no safetensors file: it has {size} bytes, its header alone would have "
                f"{length}; download it again"
            )
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: the header is damaged ({error!r}); download it again") from error
    expected = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=8 + length)
    if size != expected:
        state = "is truncated" if size < expected else "has bytes after its last tensor"
        raise CheckpointError(f"{path} {state}: {size} bytes, its header says {expected}; download it again")
    return tensors


def _tensor(path: Path, name: str, entry: Mapping[str, Any], data: int) -> StoredTensor:
    start, stop = entry["data_offsets"]
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name} is stored as {dtype}; popax loads {', '.join(DTYPES)}")
    if start < 0 or stop - start != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise CheckpointError(
            f"{path}: {name} {dtype} {shape} does not fill bytes {start} to {stop}; download it again"
        )
    return StoredTensor(file=path, name=name, dtype=dtype, shape=shape, offset=data + start, nbytes=stop - start)
