"""Some nights of real text: who is trained each night, and what the chain gains against training once on all of it."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from popax.bench.nightly.command import popax_command
from popax.bench.nightly.config import NightlyConfig
from popax.data.pipeline import PipelineConfig, UserPipeline
from popax.data.tokenize import load_tokenizer
from popax.data.users import UserDataset
from popax.errors import DataError
from popax.evaluation.columns import EvalConfig, figures
from popax.modeling.base import load_base
from popax.store.catalog import Catalog
from popax.training.inputs import open_users
from popax.training.session import score

# user -> (time, text), oldest first
Messages = Mapping[str, Sequence[tuple[float, str]]]
SEQ_LEN, BATCH = 64, 4
MODEL = """
ModelConfig.vocab_size = 1024
ModelConfig.embed_dim = 96
ModelConfig.ffw_dim = 256
ModelConfig.num_layers = 3
ModelConfig.num_heads = 4
ModelConfig.num_kv_heads = 2
ModelConfig.head_dim = 24
ModelConfig.max_seq_len = 128
ModelConfig.tied_embeddings = True
"""
TEXT = f"PipelineConfig.seq_len = {SEQ_LEN}\nPipelineConfig.batch_size = {BATCH}\n"


def bench_nights(
    messages: Messages, config: NightlyConfig, folder: Path, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(figures, a row for each night). Raises DataError where there are too few users for a base beside them."""
    by_size = sorted(messages, key=lambda user: (-len(messages[user]), user))
    users, others = sorted(by_size[: config.users]), by_size[config.users :]
    if len(users) < config.users or not others:
        raise DataError(
            f"the data has {len(messages)} users: {config.users} and some more, for the base, are asked for"
        )
    say(f"a base of {config.base_steps} steps on {len(others)} users' text")
    base = _pretrain({user: messages[user] for user in others}, config, folder)
    moments = sorted(time for user in users for time, _ in messages[user])
    ends = [moments[len(moments) * night // config.nights - 1] for night in range(1, config.nights + 1)]
    rows, known = [], dict.fromkeys(users, 0)
    for night, end in enumerate(ends, 1):
        until = {user: [one for one in messages[user] if one[0] <= end] for user in users}
        wrote = {user for user, text in until.items() if len(text) > known[user] and len(text) >= 2}
        row = _night(night, until, base, config, folder, kill=night == 2)
        trained = _trained(folder / "chain" / "catalog", night)
        rows.append(row | {"users_who_wrote": len(wrote), "users_trained": len(trained), "exact": trained == wrote})
        known |= {user: len(text) for user, text in until.items() if user in trained}
        say(f"night {night}: {len(wrote)} users wrote, {len(trained)} were trained, {row['seconds']:.0f} s")
    popax_command(_train(folder / "night.jsonl", base, folder / "once"), folder / "once")
    return _gains(users, base, config, folder) | {
        "nights_exact": all(row["exact"] for row in rows),
        "revisions_chain": _chained(folder / "chain" / "catalog"),
    }, rows


def _night(
    night: int, until: Messages, base: Path, config: NightlyConfig, folder: Path, *, kill: bool
) -> dict[str, Any]:
    _write(folder / "night.jsonl", until)
    (folder / "users.gin").write_text(
        f"{TEXT}TrainConfig.slots = {config.slots}\nTrainConfig.steps = {config.steps}\n"
        f"AdapterConfig.rank = {config.rank}\nTrainConfig.checkpoint_every = 10\n",
        encoding="utf-8",
    )
    command, seconds = _train(folder / "night.jsonl", base, folder / "chain"), 0.0
    if kill:
        seconds += popax_command(command, folder / "chain", kill_after=2).seconds
    ended = popax_command(command, folder / "chain")
    return {
        "night": night,
        "messages": sum(map(len, until.values())),
        "killed": kill,
        "seconds": seconds + ended.seconds,
    }


def _train(data: Path, base: Path, out: Path) -> list[str]:
    gin = ["--gin_file", str(data.with_name("users.gin"))]
    return ["train", *gin, "--base", str(base), "--data", str(data), "--out", str(out), "--no_table"]


def _pretrain(text: Messages, config: NightlyConfig, folder: Path) -> Path:
    _write(folder / "base.jsonl", text)
    (folder / "base.gin").write_text(
        f"{MODEL}{TEXT}PretrainConfig.steps = {config.base_steps}\nPretrainConfig.learning_rate = 3e-3\n"
        f"PretrainConfig.warmup_steps = {config.base_steps // 10}\n",
        encoding="utf-8",
    )
    files = ["--gin_file", str(folder / "base.gin"), "--data", str(folder / "base.jsonl")]
    popax_command(["pretrain", *files, "--out", str(folder / "base"), "--tokenizer", "bpe:1024"], folder / "base")
    return folder / "base" / "base"


def _write(path: Path, messages: Messages) -> None:
    with path.open("w", encoding="utf-8") as lines:
        for user, text in messages.items():
            lines.writelines(json.dumps({"user": user, "time": time, "text": one}) + "\n" for time, one in text)


def _trained(catalog: Path, night: int) -> set[str]:
    """The users of whom the night's run made a revision."""
    opened = Catalog.open(catalog, read_only=True)
    run = json.loads((catalog.parent / "run.json").read_text(encoding="utf-8"))
    assert run["round"] == night, f"night {night} was round {run['round']}"
    return {record.user for record, latest in opened.users() if latest.run == run["run"]}


def _chained(catalog: Path) -> bool:
    """Whether every revision was trained from the one before it."""
    opened = Catalog.open(catalog, read_only=True)
    histories = [opened.history(record) for record, _ in opened.users()]
    return all([one.parent for one in own] == [None, *range(1, len(own))] for own in histories)


def _gains(users: Sequence[str], place: Path, config: NightlyConfig, folder: Path) -> dict[str, Any]:
    """Bits per byte of everybody's last fifth that the chain's adapters save, and those trained once."""
    base, tokenizer = load_base(place), load_tokenizer(place)
    dataset: UserDataset = open_users([str(folder / "night.jsonl")], folder / "scored")
    pipeline = UserPipeline(dataset, tokenizer, PipelineConfig(seq_len=SEQ_LEN, batch_size=BATCH))
    found: dict[str, Any] = {}
    for name in ("chain", "once"):
        catalog = Catalog.open(folder / name / "catalog", read_only=True)
        known = [user for user in users if catalog.exists(user)]
        means = figures(score(base, pipeline, catalog, known, EvalConfig(group=8), None))
        found[f"gain_{name}"] = means["mean_base_bits_per_byte"] - means["mean_own_bits_per_byte"]
        found[f"own_beats_wrong_{name}"] = means["own_beats_wrong"]
    return found | {"gain_chain_over_once": found["gain_chain"] / found["gain_once"]}
