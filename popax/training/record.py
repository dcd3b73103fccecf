"""The identity of a run and who is in it: what a resumed run must share with the run it resumes."""

import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from popax.adapters.base import AdapterConfig
from popax.data.users import UserDataset
from popax.errors import ConfigError
from popax.store.catalog import Catalog


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The run's id, its settings and its queue of users, in `run.json`."""

    run: str
    settings: dict[str, Any]
    queue: list[str]

    @classmethod
    def open(cls, directory: Path, settings: dict[str, Any], queue: Callable[[], list[str]]) -> "RunRecord":
        """The record in this directory, or a new one. Raises ConfigError where the directory holds another run."""
        path = directory / "run.json"
        settings = json.loads(json.dumps(settings))
        if path.exists():
            record = cls(**json.loads(path.read_text(encoding="utf-8")))
            differing = sorted(k for k in settings | record.settings if settings.get(k) != record.settings.get(k))
            if differing:
                raise ConfigError(
                    f"{directory} holds run {record.run} with other settings ({', '.join(differing)}): "
                    "choose another directory, or give the settings it was started with"
                )
            return record
        record = cls(uuid.uuid4().hex, settings, queue())
        directory.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(record), indent=1), encoding="utf-8")
        os.replace(partial, path)
        return record


def data_provenance(dataset: UserDataset, user: str) -> dict[str, Any]:
    """How many examples a user has, from when to when, and their digest: equal digests mean nothing new to learn."""
    digest = hashlib.sha256()
    examples = dataset.examples(user)
    for example in examples:
        # Not where it stands in its file: another user's new line must not make this user's text new.
        content = (example.time, example.text, example.prompt, example.completion, example.messages)
        digest.update(json.dumps(content, default=repr).encode())
    times = [str(example.time) for example in (*examples[:1], *examples[-1:]) if example.time is not None]
    return {"examples": len(examples), "digest": digest.hexdigest(), **({"range": times} if times else {})}


def together_provenance(dataset: UserDataset, users: Sequence[str]) -> dict[str, Any]:
    """Of an adapter that is trained on all of their text: how many they are, and the digest over each one's digest."""
    own = [data_provenance(dataset, user) for user in users]
    digest = hashlib.sha256(json.dumps([[user, one["digest"]] for user, one in zip(users, own, strict=True)]).encode())
    return {"users": len(users), "examples": sum(one["examples"] for one in own), "digest": digest.hexdigest()}


def users_with_new_data(
    dataset: UserDataset, catalog: Catalog, users: Sequence[str], base_digest: str, config: AdapterConfig
) -> list[str]:
    """The users whose latest revision, if any, is of another base or configuration or of other data than they have."""

    def is_new(user: str) -> bool:
        if not catalog.exists(user):
            return True
        latest = catalog.history(user)[-1]
        if latest.base_digest != base_digest or AdapterConfig.from_dict(latest.config) != config:
            return True
        return latest.provenance.get("data") != data_provenance(dataset, user)

    return [user for user in users if is_new(user)]
