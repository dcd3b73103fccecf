"""What a person at a terminal sees of a run, and what its directory keeps of it: progress and metrics."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from popax.population.step import StepMetrics
from popax.training.metrics import MetricsWriter
from popax.training.pretrain import PretrainConfig, PretrainHooks
from popax.training.progress import Progress
from popax.training.record import RunRecord
from popax.training.stream import Seating

# Of an objective's metrics: how much there was, not what it cost; and what is reported in any case.
COUNTED = {"targets", "target_bytes", "loss", "grad_norm_max", "users_training", "skipped_steps"}


@contextlib.contextmanager
def watch_pretraining(
    directory: Path, config: PretrainConfig, *, save_config: Callable[[], object], stop_requested: Callable[[], bool]
) -> Iterator[PretrainHooks]:
    """Hooks that show a bar and write one metrics line a step; the run's checkpoint says where both go on.

    save_config is called when the run begins: by then it is known that the directory is this run's.
    """
    with contextlib.ExitStack() as opened:
        bar: list[Progress] = []
        lines: list[MetricsWriter] = []

        def on_start(step: int) -> None:
            save_config()
            bar.append(opened.enter_context(Progress("pretrain", total=config.steps, start=step)))
            lines.append(opened.enter_context(MetricsWriter(directory, resume_step=step)))

        def on_step(step: int, loss: float) -> None:
            lines[0].write(step, {"loss": loss, "perplexity": math.exp(min(loss, 700.0))})
            bar[0].update(note=f"loss {loss:.3f}")

        yield PretrainHooks(on_start=on_start, on_step=on_step, stop_requested=stop_requested)


class PopulationWatch:
    """The `on_start` and `on_round` of a population run: users done on the bar, one metrics line a round.

    save_config is called when the run begins, as with `watch_pretraining`.
    """

    def __init__(self, directory: Path, *, save_config: Callable[[], object]):
        self._directory, self._save_config = directory, save_config
        self._opened, self._done = contextlib.ExitStack(), 0
        self._skipped = 0  # since this process began

    def on_start(self, record: RunRecord, seating: Seating) -> None:
        self._save_config()
        self._done = users_done(seating)
        self._bar = self._opened.enter_context(
            Progress("train", total=len(record.queue), start=self._done, unit="user")
        )
        self._lines = self._opened.enter_context(MetricsWriter(self._directory, resume_step=seating.iteration))

    def on_round(self, seating: Seating, metrics: Sequence[StepMetrics]) -> None:
        values = round_metrics(metrics) | {"users_done": users_done(seating)}
        self._lines.write(seating.iteration, values)
        self._skipped += int(values["skipped_steps"])
        note = f"loss {values['loss']:.3f}" + (f", {self._skipped} steps skipped" if self._skipped else "")
        self._bar.update(users_done(seating) - self._done, note=note)
        self._done = users_done(seating)

    def __enter__(self) -> "PopulationWatch":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


class Unwatched:
    """In place of a PopulationWatch, where another process shows and records the run."""

    def on_start(self, record: RunRecord, seating: Seating) -> None:
        """Nothing."""

    def on_round(self, seating: Seating, metrics: Sequence[StepMetrics]) -> None:
        """Nothing."""

    def __enter__(self) -> "Unwatched":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was opened."""


def users_done(seating: Seating) -> int:
    """Users who have had a seat and left it."""
    return seating.table.next - len(seating.table.occupied)


def round_metrics(metrics: Sequence[StepMetrics]) -> dict[str, float]:
    """Over one round: the loss over all members that ran, by what it weighs (`targets`), the largest gradient norm, and
    the steps that were skipped because something in them was not finite (`member_update`).

    What else the objective's metrics add up, named by a NamedTuple or a dict, is given by weight as well.
    """
    host: list[StepMetrics] = jax.device_get(list(metrics))
    ran = np.concatenate([step.ran for step in host])

    def total(value: Callable[[StepMetrics], Any]) -> float:
        return float(np.concatenate([value(step) for step in host])[ran].sum())

    weights = total(lambda step: step.weights)
    by_weight = {"loss": total(lambda step: step.loss * step.weights)}
    for name in sorted(_named(host[0].sums).keys() - COUNTED):
        by_weight[name] = total(lambda step, name=name: _named(step.sums)[name])
    norms = np.concatenate([step.grad_norm for step in host])
    return {
        **{name: value / weights if weights else math.nan for name, value in by_weight.items()},
        "targets": weights,
        "grad_norm_max": float(norms[ran].max()) if ran.any() else math.nan,
        "users_training": float(host[0].ran.sum()),
        "skipped_steps": float(sum(step.skipped.sum() for step in host)),
    }


def _named(sums: Any) -> dict[str, Any]:
    """An objective's metrics by name, those that are numbers; nothing where they have no names."""
    found = sums if isinstance(sums, dict) else sums._asdict() if hasattr(sums, "_asdict") else {}
    return {name: leaf for name, leaf in found.items() if isinstance(leaf, np.ndarray)}


@contextlib.contextmanager
def step_bar(name: str, unit: str = "step") -> Iterator[Callable[[int, int], None]]:
    """tell(done, total) moves a bar that opens with the first call."""
    with contextlib.ExitStack() as opened:
        bar: list[Progress] = []

        def tell(done: int, total: int) -> None:
            if not bar:
                bar.append(opened.enter_context(Progress(name, total=total, unit=unit)))
            bar[0].update(done - bar[0].done)

        yield tell
