"""What a command is pointed at, opened: users' text, built into a dataset where it is raw, and a tokenizer."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from popax.atomic import new_directory, write_text
from popax.data.records import Columns, Example, find_sources
from popax.data.tfds import build_dataset
from popax.data.tokenize import Tokenizer, load_tokenizer, train_bpe
from popax.data.users import UserDataset
from popax.errors import ConfigError, DataError, TokenizerError
from popax.modeling.model import Model
from popax.modeling.virtual import check_room

BPE = "bpe:"
SOURCES_FILE = "sources.json"


def open_users(
    sources: Sequence[str | os.PathLike[str]],
    directory: Path,
    columns: Columns | None = None,
    *,
    progress: bool = False,
    set_aside: bool = False,
    may_replace: Callable[[], object] | None = None,
) -> UserDataset:
    """A dataset directory as it is; raw sources (popax.data.records) built into `directory` first.

    A dataset that was built there from the same bytes and columns is used again; one of others is built anew where
    may_replace() raises nothing, and without it refused (DataError). set_aside: as `build_dataset` has it. Raises
    whatever `build_dataset` raises; the dataset before is then still there.
    """
    if len(sources) == 1 and _is_dataset(Path(sources[0])):
        return UserDataset.open(Path(sources[0]))
    files = find_sources([str(source) for source in sources])
    record = {
        "files": [{"name": file.name, "sha256": _sha256(file)} for file in files],
        "columns": dataclasses.asdict(columns or Columns()),
    }
    record = json.loads(json.dumps(record))
    path = directory / SOURCES_FILE
    if _is_dataset(directory):
        if path.exists() and _same_sources(json.loads(path.read_text(encoding="utf-8")), record):
            return UserDataset.open(directory)
        if may_replace is None:
            raise DataError(
                f"{directory} holds a dataset of other sources or columns: choose another output directory, remove "
                "this one, or give it as the data itself"
            )
        may_replace()

    def write(place: Path) -> None:
        build_dataset([str(file) for file in files], place, columns=columns, progress=progress, set_aside=set_aside)
        write_json(place / SOURCES_FILE, record)

    save_once(directory, write, replace=True)
    return UserDataset.open(directory)


def select_users(dataset: UserDataset, *, at_least: int = 0, below: int | None = None) -> list[str]:
    """Users with at_least <= examples < below. Raises DataError where there is none."""
    counts = dataset.counts()
    chosen = [user for user, count in counts.items() if count >= at_least and (below is None or count < below)]
    if not chosen:
        limits = f"at least {at_least}" + (f" and fewer than {below}" if below is not None else "")
        raise DataError(f"none of the {len(counts)} users has {limits} examples; the most is {max(counts.values())}")
    return chosen


def make_tokenizer(spec: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """ "byte", a tokenizer's path, or "bpe:SIZE": a byte-level BPE trained on `texts()`. Raises TokenizerError."""
    if not spec.startswith(BPE):
        return load_tokenizer(spec)
    size = spec.removeprefix(BPE)
    if not size.isdigit():
        raise TokenizerError(f"tokenizer {spec!r}: bpe:SIZE with the number of tokens, such as bpe:2048")
    return train_bpe(texts(), int(size))


def check_fits(model: Model, tokenizer: Tokenizer, seq_len: int, virtual_tokens: int = 0) -> None:
    """Raises ConfigError where the tokenizer has more tokens than the model, or rows exceed the model's context, alone
    or with the virtual tokens of an adapter (`Cohort.virtual_tokens`) before them."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, ModelConfig.vocab_size is {model.config.vocab_size}: "
            "a base needs an embedding for each; use the base's own tokenizer, or set vocab_size when pretraining"
        )
    if seq_len > model.config.max_seq_len:
        raise ConfigError(
            f"PipelineConfig.seq_len={seq_len} exceeds ModelConfig.max_seq_len={model.config.max_seq_len}: the model "
            "would run beyond its own context; shorten the rows"
        )
    check_room(model.config, seq_len, virtual_tokens)


def texts_of(examples: Iterable[Example]) -> Iterator[str]:
    """What a tokenizer is trained on: every text, prompt, completion and message."""
    for example in examples:
        messages = example.messages or ()
        yield from (str(message["content"]) for message in messages if message.get("content"))
        yield from (part for part in (example.text, example.prompt, example.completion) if part)


def write_json(path: Path, value: Any) -> None:
    """The file is whole or absent; its folders are made."""
    write_text(path, json.dumps(value, indent=1))


def save_once(final: Path, write: Callable[[Path], None], *, replace: bool = False) -> None:
    """A directory that `write` fills: it appears under its name when it is complete. replace: as `new_directory`."""
    with new_directory(final, replace=replace) as partial:
        write(partial)


def _is_dataset(directory: Path) -> bool:
    nested = (path for path in directory.glob("*/*/dataset_info.json") if not path.parts[-3].startswith("."))
    return (directory / "dataset_info.json").is_file() or any(nested)


def _same_sources(kept: dict[str, Any], now: dict[str, Any]) -> bool:
    # By their bytes, in their order: a file that was moved or renamed is the same text.
    return kept["columns"] == now["columns"] and [one["sha256"] for one in kept["files"]] == [
        one["sha256"] for one in now["files"]
    ]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
