"""The demo, step by step: a base, a population in one step, revisions, mixed generation, one user extracted."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from popax.data.pipeline import UserPipeline
from popax.data.stdlib import Documents
from popax.data.tokenize import Tokenizer, load_tokenizer
from popax.demo.config import DemoConfig
from popax.demo.corpus import as_dataset, corpus_digest, demo_corpus, megabytes
from popax.evaluation.columns import UserScores
from popax.modeling.base import Base, load_base
from popax.serving.text import GeneratedText, generate_text
from popax.store.catalog import Catalog
from popax.store.extract import extract_to_peft
from popax.store.pointers import LATEST
from popax.training.base_run import pretrain_base
from popax.training.console import step_bar
from popax.training.pretrain import PretrainHooks
from popax.training.session import Session

PROMPT = "    def __init__(self, "


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo found, and where it lies."""

    scores: list[UserScores]
    texts: list[GeneratedText]
    catalog: Path
    extracted: Path
    facts: dict[str, Any]


class Stopped(Exception):
    """A stop was requested; the message says what is kept."""


def run_demo(
    config: DemoConfig,
    *,
    directory: Path,
    cache: Path,
    say: Callable[[str], None],
    stop_requested: Callable[[], bool],
    save_config: Callable[[Path], object] = lambda place: None,
) -> DemoResult:
    """All of it. Raises Stopped between rounds once a stop is requested; the same call then continues."""
    corpus = demo_corpus(config.users, config.max_user_bytes)
    say(
        f"users: {len(corpus.users)} packages of Python's standard library ({megabytes(corpus.users):.1f} MB); "
        f"base: the other {len(corpus.base)} ({megabytes(corpus.base):.1f} MB)"
    )
    place, cached = cached_base(config, corpus.base, cache, say, stop_requested)
    base, tokenizer = load_base(place), load_tokenizer(place)
    session = Session(
        base=base,
        pipeline=UserPipeline(as_dataset(corpus.users), tokenizer, config.pipeline()),
        config=config.train(),
        evaluation=config.evaluation(),
        catalog=Catalog.open(directory / "catalog", create=True),
        users=sorted(corpus.users),
        directory=directory,
    )
    say(f"training {config.users} users' adapters in one population step, rank {config.rank}")
    report = session.train(everyone=False, save_config=lambda: save_config(directory), stop_requested=stop_requested)
    if not report.finished:
        raise Stopped(f"iteration {report.iterations} is checkpointed in {directory}; the same command continues")
    say("training the shared adapter on everybody's text, as many tokens, and scoring all columns")
    scores = session.compare()
    best = sorted(scores, key=lambda row: row.own - row.base)
    writers = [row.user for row in best[: config.generate_users]]
    texts = write_texts(base, tokenizer, session.catalog, writers, config)
    extracted = directory / f"peft-{writers[0]}"
    extract_to_peft(directory / "catalog", writers[0], extracted, overwrite=True)
    return DemoResult(
        scores=scores,
        texts=texts,
        catalog=directory / "catalog",
        extracted=extracted,
        facts={"base_cached": cached, "base_parameters": base.model.num_params, "iterations": report.iterations},
    )


def cached_base(
    config: DemoConfig,
    text: dict[str, Documents],
    cache: Path,
    say: Callable[[str], None],
    stop_requested: Callable[[], bool],
) -> tuple[Path, bool]:
    """Where the base for this config and this text is, with its tokenizer: cached (the flag), or pretrained now."""
    identity = {
        "model": config.model(config.vocab_size).to_dict(),
        "pretrain": dataclasses.asdict(config.pretrain()),
        "data": dataclasses.asdict(config.base_pipeline()),
        "text": corpus_digest(text),
    }
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    place = cache / f"demo-base-{name}"
    cached = (place / "base").exists()
    if not cached:
        say(f"pretraining a base of {config.base_steps} steps, once; it is kept in {place}")
        dataset = as_dataset(text)
        with step_bar("pretrain") as tell:
            report = pretrain_base(
                dataset,
                dataset.users(),
                config.model(config.vocab_size),
                config.base_pipeline(),
                config.pretrain(),
                tokenizer=f"bpe:{config.vocab_size}",
                directory=place,
                hooks=PretrainHooks(
                    on_step=lambda step, loss: tell(step, config.base_steps), stop_requested=stop_requested
                ),
            )
        if report.base is None:
            raise Stopped(f"step {report.steps} of the base is checkpointed in {place}; the same command continues")
    return place / "base", cached


def write_texts(
    base: Base, tokenizer: Tokenizer, catalog: Catalog, users: Sequence[str], config: DemoConfig
) -> list[GeneratedText]:
    """The same prompt continued by the base and by these users, in one batch."""
    rows = ["base", *users]
    return generate_text(
        base,
        tokenizer,
        catalog,
        rows,
        [PROMPT] * len(rows),
        max_new_tokens=config.new_tokens,
        seed=config.seed,
        revision=LATEST,  # just trained, and shown as it is: no gate has seen it
    )


def cache_directory() -> Path:
    """The user's cache directory for popax: $XDG_CACHE_HOME/popax, or ~/.cache/popax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "popax"


def next_directory(wanted: Path, done: str) -> Path:
    """`wanted`, or wanted-2, -3, ...: the first that holds no finished demo, so that an unfinished one goes on."""
    candidate, number = wanted, 1
    while (candidate / done).exists():
        number += 1
        candidate = wanted.with_name(f"{wanted.name}-{number}")
    return candidate
