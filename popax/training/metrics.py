"""Metrics of a run: one JSON line a step, and the same numbers as TensorBoard events."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from tensorboardX import SummaryWriter

from popax.atomic import write_text


class MetricsWriter:
    """Appends to `directory/metrics.jsonl` and to TensorBoard events in `directory/tensorboard`.

    A run that resumes at a checkpoint of step s gives resume_step=s: lines of later steps, and a last line that a
    kill cut short, are dropped first, so that no step stands twice.
    """

    def __init__(self, directory: str | os.PathLike[str], *, resume_step: int | None = None):
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            _keep_until(self.path, math.inf if resume_step is None else resume_step)
        self._lines = self.path.open("a", encoding="utf-8")
        purge = None if resume_step is None else resume_step + 1
        self._events = SummaryWriter(logdir=str(folder / "tensorboard"), purge_step=purge)

    def write(self, step: int, values: Mapping[str, SupportsFloat | str | bool]) -> None:
        """One line {"step", "time", **values}; numbers go to TensorBoard too. time: seconds since the epoch.

        A number that is not finite is null in the JSON, which has no word for it.
        """
        record: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
        for name, value in values.items():
            if isinstance(value, str | bool):
                record[name] = value
                continue
            number = float(value)
            record[name] = number if math.isfinite(number) else None
            self._events.add_scalar(name, number, int(step))
        self._lines.write(json.dumps(record, allow_nan=False) + "\n")
        self._lines.flush()

    def close(self) -> None:
        self._lines.close()
        self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records that a MetricsWriter left in this directory, in the order written."""
    with (Path(directory) / "metrics.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _keep_until(path: Path, last_step: float) -> None:
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= last_step]
    write_text(path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.nan  # compares false with every step: the line goes
