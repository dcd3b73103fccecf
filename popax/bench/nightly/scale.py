"""A night on which few of many users have written: how long until the first step, and how much memory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.bench.nightly.command import popax_command
from popax.bench.nightly.config import NightlyConfig
from popax.data.tokenize import load_tokenizer
from popax.modeling.base import Base, new_base, save_base
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.store.catalog import Catalog
from popax.store.commit import Commit
from popax.store.layout import RowLayout
from popax.training.inputs import open_users
from popax.training.news import AT_ONCE

ADAPTER = AdapterConfig(rank=4)
USERS = """
PipelineConfig.seq_len = 64
PipelineConfig.batch_size = 2
AdapterConfig.rank = 4
TrainConfig.slots = 32
TrainConfig.steps = 10
EarlyStop.every = 1
"""


def bench_scale(config: NightlyConfig, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds to the first round, from raw files that have grown, and of the call after it, when nobody has news."""
    base, data = _base(folder / "base"), folder / "messages.jsonl"
    (folder / "users.gin").write_text(USERS, encoding="utf-8")
    with data.open("w", encoding="utf-8") as lines:
        for at in range(config.scale_messages):
            lines.writelines(_line(user, at) for user in range(config.scale_users))
    say(f"{config.scale_users:,} users' revisions")
    _commit_all(base, data, folder)
    with data.open("a", encoding="utf-8") as lines:
        step = config.scale_users // config.scale_news
        lines.writelines(_line(user * step, config.scale_messages) for user in range(config.scale_news))
    command = ["train", "--gin_file", str(folder / "users.gin"), "--base", str(folder / "base"), "--no_table"]
    command += ["--data", str(data), "--out", str(folder / "run"), "--catalog", str(folder / "catalog")]
    say(f"a night of {config.scale_news:,} users' news")
    report = folder / "night.json"
    night = popax_command([*command, "--json", str(report)], folder / "run")
    trained = json.loads(report.read_text(encoding="utf-8"))["figures"]["users_trained"]
    say("a call without news")
    again = popax_command([*command, "--json", str(report)], folder / "run")
    return {
        "scale_users": config.scale_users,
        "scale_trained": trained,
        "scale_first_round_s": night.first_round,
        "scale_peak_bytes": night.peak_bytes,
        "scale_night_s": night.seconds,
        "scale_nothing_new_s": again.seconds,
        "scale_nothing_new_trained": json.loads(report.read_text(encoding="utf-8"))["figures"]["users_trained"],
    }


def _line(user: int, at: int) -> str:
    return json.dumps({"user": f"user-{user:07d}", "time": at, "text": f"message {at} of user {user}"}) + "\n"


def _base(place: Path) -> Base:
    """Random weights: what is timed does not depend on them."""
    tokenizer = load_tokenizer("byte")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        embed_dim=32,
        ffw_dim=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_seq_len=128,
    )
    model = Model(config)
    base = new_base(model, model.init(jax.random.key(0)), source="random weights")
    save_base(place, base)
    tokenizer.save(place)
    return base


def _commit_all(base: Base, data: Path, folder: Path) -> None:
    """A revision for each user, as a run on this text would have made it."""
    dataset = open_users([str(data)], folder / "before")
    users = dataset.users()
    digests, counts = dataset.digests(users), dataset.counts()
    cohort = Cohort.of(ADAPTER, base.model.sites())
    layout = RowLayout.of(cohort.abstract())
    catalog = Catalog.open(folder / "catalog", create=True)
    stored = catalog.cohort(ADAPTER, cohort.specs, base.digest, layout)
    row = np.zeros(layout.row_bytes, np.uint8)
    for at in range(0, len(users), AT_ONCE):
        told = [(user, {"examples": counts[user], "digest": digests[user]}) for user in users[at : at + AT_ONCE]]
        catalog.commit_batch(stored, [Commit(user, row, provenance={"data": one}, run="before") for user, one in told])
