"""What a training run is: frozen, keyword-only, and the same for every user of the run."""

import dataclasses
import math
import numbers
import re
from collections.abc import Callable

from popax.adapters.base import AdapterConfig
from popax.adapters.table import method_of
from popax.errors import ConfigError
from popax.modeling.remat import Remat, check_remat
from popax.named import is_reference, load_named
from popax.objectives.table import ObjectiveMaker, check_objective
from popax.population.bounds import NormKind, check_bounds
from popax.population.early_stop import EarlyStop
from popax.population.optimizer import Optimizer, Schedule, adamw, as_optimizer, check_schedule, warmup_cosine
from popax.population.state import hparams
from popax.types import HParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class CohortRule:
    """Users whose id fully matches the pattern `users` have this adapter; None: the base alone, and nothing is trained.

    when: a function of the user's id that says whether the rule is theirs, or "module:name" of one, beside the pattern.
    learning_rate: None is the run's own, and where it has none, that of the adapter's method.
    """

    users: str = ".*"
    adapter: AdapterConfig | None = AdapterConfig()  # noqa: RUF009 - frozen
    learning_rate: float | None = None
    when: str | Callable[[str], bool] | None = None

    def __post_init__(self):
        if isinstance(self.when, str):
            object.__setattr__(self, "when", load_named(self.when, "CohortRule.when"))
        try:
            re.compile(self.users)
        except re.error as error:
            raise ConfigError(f"users={self.users!r} is not a regular expression: {error}") from error
        check_rate(self.learning_rate, "CohortRule")

    def has(self, user: str) -> bool:
        matches = re.fullmatch(self.users, user) is not None
        return matches and (not callable(self.when) or bool(self.when(user)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A population run. steps is each user's own number; slots is how many users share one compiled step.

    turns: so many times as many users have a seat; they train by turns, a round each, and wait in host memory, which
    leaves the device's to one turn.
    learning_rate: None is that of the adapter's method (`AdapterMethod.learning_rate`), where to begin with Adam.
    Users with fewer rows than steps * accumulate * batch_size see them at most max_epochs times; users with fewer
    examples than min_examples are left out. checkpoint_every counts iterations of the whole population.
    validation_rows: how many rows of a user's validation slice early stopping looks at. early_stop: None trains every
    user to the last step and keeps the last adapter. save_optimizer_state: the optimizer's state of the adapter that is
    kept is committed beside it, and a user who has one goes on from there: steps are counted on, and with a schedule
    of the step alone (`constant`, `warmup_constant`) two runs give the bytes of one.
    objective: what is minimised: a row of popax.objectives.table, or "module:name" of your own. accumulate: a step's
    gradient is that of so many batches of PipelineConfig.batch_size rows, of which one is in memory at a time.
    cohorts: rules that give users adapters of several kinds in one run, instead of `adapter`; the first that matches a
    user wins (`Session.by_cohort`).
    norm_budget, norm_kind: no step leaves a user's change of all weights larger than this, in this norm (inf: none).
    kl_weight: of the divergence of a user's predictions from the base's, nats a target, in the loss; above 0 each step
    costs a forward pass of the base and one more of the adapters.
    """

    adapter: AdapterConfig = AdapterConfig()  # noqa: RUF009 - frozen
    cohorts: tuple[CohortRule, ...] = ()
    slots: int = 32
    turns: int = 1
    steps: int = 100
    learning_rate: float | None = None
    clip_norm: float = 1.0
    max_epochs: float = float("inf")
    objective: str | ObjectiveMaker = "sft"
    accumulate: int = 1
    optimizer: Optimizer = dataclasses.field(default_factory=adamw)
    schedule: Schedule = dataclasses.field(default_factory=warmup_cosine)
    early_stop: EarlyStop | None = EarlyStop()  # noqa: RUF009 - frozen
    checkpoint_every: int = 100
    min_examples: int = 2
    validation_rows: int = 4
    seed: int = 0
    remat: Remat = "none"
    save_optimizer_state: bool = False
    norm_budget: float = float("inf")
    norm_kind: NormKind = "frobenius"
    kl_weight: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "cohorts", tuple(self.cohorts))
        for name in ("optimizer", "schedule"):
            if is_reference(getattr(self, name)):
                object.__setattr__(self, name, load_named(getattr(self, name), f"TrainConfig.{name}"))
        for name in ("slots", "turns", "steps", "accumulate", "checkpoint_every", "validation_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: at least 1")
        check_remat(self.remat, "TrainConfig")
        check_bounds(self.norm_budget, self.kl_weight)
        check_rate(self.learning_rate, "TrainConfig")
        check_objective(self.objective)
        object.__setattr__(self, "optimizer", as_optimizer(self.optimizer))
        check_schedule(self.schedule)
        if not (self.clip_norm > 0 and self.max_epochs > 0):
            raise ConfigError(
                f"clip_norm={self.clip_norm}, max_epochs={self.max_epochs}: positive (inf switches them off)"
            )

    @property
    def rate(self) -> float:
        """The learning rate: the one given, or that of the adapter's method."""
        return method_of(self.adapter).learning_rate if self.learning_rate is None else self.learning_rate

    def member_settings(self, max_steps: int) -> HParams:
        """A user's own, as arrays."""
        return hparams(
            learning_rate=self.rate,
            clip_norm=self.clip_norm,
            max_steps=max_steps,
            norm_budget=self.norm_budget,
            kl_weight=self.kl_weight,
        )

    def recorded_settings(self) -> dict[str, float]:
        """What a revision keeps of them; bounds where there are some."""
        settings: dict[str, float] = {"learning_rate": self.rate, "steps": self.steps, "clip_norm": self.clip_norm}
        bounds = {"norm_budget": self.norm_budget} if self.budget else {}
        return settings | bounds | ({"kl_weight": self.kl_weight} if self.kl_weight else {})

    @property
    def budget(self) -> NormKind | None:
        """The norm that is kept within a budget, if any."""
        return None if self.norm_budget == float("inf") else self.norm_kind

    @property
    def round_length(self) -> int:
        """Iterations between two looks at who has finished: the validation interval."""
        return self.early_stop.every if self.early_stop else min(10, self.steps)

    def steps_for(self, rows: int, batch_size: int) -> int:
        """This user's own number of steps, from the rows of text they have; 0 without any."""
        if not rows:
            return 0
        if self.max_epochs == float("inf"):
            return self.steps
        return max(1, min(self.steps, round(self.max_epochs * rows / (batch_size * self.accumulate))))


def check_rate(learning_rate: object, owner: str) -> None:
    """Raises ConfigError on what is no learning rate, or None."""
    if learning_rate is None:
        return
    if callable(learning_rate):
        raise ConfigError(
            f"{owner}.learning_rate={learning_rate!r}: a number; how it changes from step to step is the schedule's, a "
            "factor on it (popax.population.optimizer.warmup_cosine, for instance)"
        )
    if not isinstance(learning_rate, numbers.Real) or not 0 <= float(learning_rate) < math.inf:
        raise ConfigError(f"{owner}.learning_rate={learning_rate!r}: a finite number of at least 0")
