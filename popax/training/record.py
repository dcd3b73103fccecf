"""The identity of a run and who is in it: what a resumed run must share with the run it resumes.

A run's directory holds one round after another: a round trains who has something new, and is resumed until it is
finished; the same command with more data then begins the next one. `run.json` is the record of the latest round.
"""

import dataclasses
import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from popax.errors import ConfigError
from popax.population.described import compared
from popax.training.aside import SetAside
from popax.training.inputs import write_json
from popax.training.news import DataIdentity

FORMAT = 3  # from 3 on, a member's checkpoint has their own betas, eps and decay
FUNCTIONS = ("optimizer", "schedule")  # settings that are functions, as `described` has them
RECORD_FILE, CHECKPOINTS = "run.json", "checkpoints"
CLOSE = "--close_stopped"


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A round: its id, the settings it was begun with, and its queue of users.

    round: from 1. begins, ends: the iterations between which it is; None while it is not over. tokenizer, data: digests
    of what it learns from; None in a record of an older version. finished: everyone in the queue has been trained, or
    set aside. tabled: its table was made. left: of users who were left as they are in this round or before it, why
    (`SetAside`), the digest of their text ("data") and the revision that they had then.
    """

    run: str
    settings: dict[str, Any]
    queue: list[str]
    format: int = 1
    round: int = 1
    begins: int = 0
    ends: int | None = None
    tokenizer: str | None = None
    data: dict[str, Any] | None = None
    finished: bool = False
    tabled: bool = False
    left: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> "RunRecord | None":
        """The record in this directory, None where there is none. Raises ConfigError where it cannot be read."""
        path = directory / RECORD_FILE
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            known = {field.name for field in dataclasses.fields(cls)}
            if record.get("format", 1) > FORMAT:
                raise ConfigError(f"{path} is of a newer popax (format {record['format']}): use that one")
            return cls(**{name: value for name, value in record.items() if name in known})
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is not a run's record ({error}); restore it, or choose another run") from error

    @classmethod
    def new(cls, settings: Mapping[str, Any], queue: Sequence[str], **fields: Any) -> "RunRecord":
        """A round that has not begun."""
        return cls(uuid.uuid4().hex, json.loads(json.dumps(settings)), list(queue), format=FORMAT, **fields)

    def write(self, directory: Path) -> "RunRecord":
        """Keep it as this directory's record; returns it."""
        write_json(directory / RECORD_FILE, dataclasses.asdict(self))
        return self

    def replace(self, **changes: Any) -> "RunRecord":
        """This record with other fields."""
        return dataclasses.replace(self, **changes)

    def check_settings(self, settings: Mapping[str, Any], directory: Path) -> None:
        """Raises ConfigError where this run was begun with other settings; what was no setting then is not compared."""
        now = json.loads(json.dumps(settings))
        both = now.keys() & self.settings.keys()
        differing = sorted(name for name in both if not _same(name, self.settings[name], now[name]))
        if differing:
            raise ConfigError(
                f"{directory} holds run {self.run} with other settings ({', '.join(differing)}): choose another "
                "directory (with the same catalog users go on from their revisions), or give the settings it was "
                "started with"
            )

    def check_resumable(self, tokenizer: str, data: DataIdentity, directory: Path) -> None:
        """Raises ConfigError where a stopped round cannot be resumed as it was begun: another tokenizer, other text."""
        how = (
            f"{CLOSE} closes it (users in training fall back to their last revision) and starts a new round with what "
            "is given now"
        )
        if self.tokenizer is None or self.data is None:
            raise ConfigError(
                f"{directory} holds run {self.run} that an older popax stopped, whose steps this one takes otherwise: "
                f"let that version finish it, or {how}"
            )
        if self.format < FORMAT:
            raise ConfigError(
                f"{directory} holds run {self.run} that an older popax stopped, whose checkpoints lack what users "
                f"have as settings now: let that version finish it, or {how}"
            )
        if self.data["digest"] != data.digest:
            raise ConfigError(
                f"{directory} holds run {self.run}, stopped while it trained on other data: "
                f"{DataIdentity(**self.data)}, now {data}: give the data it was started with, or {how}"
            )
        if self.tokenizer != tokenizer:
            raise ConfigError(
                f"{directory} holds run {self.run}, stopped while it trained with another tokenizer "
                f"({self.tokenizer[:12]}, now {tokenizer[:12]}): give that one, or {how}"
            )

    def check_tokenizer(self, tokenizer: str, directory: Path) -> None:
        """Raises ConfigError where the run's earlier rounds were made with another tokenizer."""
        if self.tokenizer not in (None, tokenizer):
            raise ConfigError(
                f"{directory} holds run {self.run}, which was trained with another tokenizer ({self.tokenizer[:12]}, "
                f"now {tokenizer[:12]}): give that one, or choose another directory"
            )

    def with_left(self, aside: Sequence[SetAside], had: Mapping[str, tuple[str, int]]) -> "RunRecord":
        """The record with these users left as they are. had: each one's digest of text, and revision."""
        told = {one.user: {**one.to_dict(), "data": had[one.user][0], "revision": had[one.user][1]} for one in aside}
        kept = {user: entry for user, entry in self.left.items() if user not in self.queue}
        return self.replace(left={**kept, **told})


def discard_checkpoints(directory: Path) -> None:
    """Those of a round that is over: gone at once or not at all."""
    place, old = directory / CHECKPOINTS, directory / f".{CHECKPOINTS}.old"
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def _same(name: str, then: Any, now: Any) -> bool:
    # Of functions an older version kept the name alone. A stopped round of it is refused in any case.
    return compared(then, now) != "other" if name in FUNCTIONS else then == now
