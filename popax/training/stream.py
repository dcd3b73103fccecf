"""A population larger than its slots: users take a seat, train, are written back, and make room for the next.

All decisions fall at the end of a round (a fixed number of iterations, of each turn) and depend on the state alone,
never on timing, so that a run resumed from any checkpoint is bitwise the run that was never stopped.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from popax.adapters.cohort import Cohort
from popax.distributed.group import ProcessGroup
from popax.population.slots import SlotTable
from popax.population.state import PopulationState
from popax.population.step import StepMetrics
from popax.population.turns import Turns
from popax.training.aside import SetAside
from popax.training.compiled import Programs, abstract_population, empty_slots
from popax.training.config import TrainConfig
from popax.training.fit import BatchesAhead, fit
from popax.training.members import Finished, MemberSource, RevisionWriter
from popax.types import AdapterState, Batch, Params


class UserData(Protocol):
    """The data side of a run (popax.data.pipeline.UserPipeline)."""

    def population(self, users: Sequence[str | None], steps: Sequence[int], accumulate: int = 1) -> Batch: ...
    def evaluation(self, users: Sequence[str | None], split: str, max_rows: int | None = None) -> Batch: ...


class Seating(NamedTuple):
    """Where a run stands: `iteration` of the population, the seats, the state of each turn's slots, and who was set
    aside on the way."""

    iteration: int
    table: SlotTable
    states: tuple[PopulationState, ...]
    aside: tuple[SetAside, ...] = ()


class Turn(NamedTuple):
    """A turn in the slots, and where its round stands: the seat of each slot, the table of all, the slots' state."""

    seats: list[int]
    iteration: int
    table: SlotTable
    state: PopulationState
    aside: tuple[SetAside, ...]

    @property
    def users(self) -> list[str | None]:
        """Who is in each slot."""
        return [self.table.users[seat] for seat in self.seats]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a run tells the outside: after each round (with the round's metrics) and at each checkpoint.

    refused: of everyone who left their seats, who could not be written; asked once those are durable.
    stop_requested: of this process; all stop where one does, after the same round.
    """

    on_round: Callable[[Seating, list[StepMetrics]], None] = lambda seating, metrics: None
    refused: Callable[[], Sequence[SetAside]] = tuple
    save: Callable[[Seating], None] = lambda seating: None
    stop_requested: Callable[[], bool] = lambda: False


class PopulationStream:
    """Trains a queue of users through the slots of one compiled step.

    Where several processes run it together, each has the same table and calls the same programs in the same order; it
    reads the text, loads the members and writes the revisions of its own slots only.
    """

    def __init__(
        self,
        *,
        base: Params,
        shared: AdapterState,
        cohort: Cohort,
        config: TrainConfig,
        programs: Programs,
        data: UserData,
        queue: Sequence[str],
        source: MemberSource,
        writer: RevisionWriter,
        turns: Turns,
        hooks: Hooks | None = None,
        begins: int = 0,
    ):
        """begins: the iteration that the first step is counted from."""
        self._base, self._shared, self._cohort, self._config = base, shared, cohort, config
        self._programs, self._data, self._queue = programs, data, list(queue)
        self._source, self._writer, self._hooks, self._begins = source, writer, hooks or Hooks(), begins
        self._turns, self._placement, self._group = turns, turns.placement, ProcessGroup.current()
        self._batches = BatchesAhead(self._make_batch, kept=turns.count + 1)

    def fresh(self) -> Seating:
        """All seats empty, nobody trained."""
        shardings = self._placement.shardings(self._cohort, abstract_population(self._cohort, self._config))
        make = functools.partial(empty_slots, self._cohort, self._config)
        made = make if shardings is None else jax.jit(make, out_shardings=shardings)
        states = tuple(self._turns.to_host(made()) for _ in range(self._turns.count))
        return Seating(self._begins, SlotTable.empty(self._turns.seats.slots), states)

    def run(self, seating: Seating | None = None) -> Seating:
        """Train everyone in the queue. Returns early, after a checkpoint, when a stop is requested."""
        seating = self._each_turn(self.fresh(), self._seat, lambda turn: True) if seating is None else seating
        try:
            while seating.table.occupied:
                before = seating.iteration
                seating, metrics = self._round(seating)
                self._hooks.on_round(seating, metrics)
                stop = self._group.any_of(self._hooks.stop_requested())
                every = self._config.checkpoint_every
                if stop or seating.iteration // every > before // every:
                    seating = self._checkpoint(seating)
                if stop:
                    return seating
            return self._checkpoint(seating)
        finally:
            self._batches.close()

    def _checkpoint(self, seating: Seating) -> Seating:
        # Users who left their seats are in no checkpoint: they must be durable before it replaces the previous one.
        self._writer.flush()
        seating = seating._replace(aside=(*seating.aside, *self._hooks.refused()))
        self._hooks.save(seating)
        return seating

    def _each_turn(self, seating: Seating, visit: Callable[[Turn], Turn], wanted: Callable[[Turn], bool]) -> Seating:
        """The seating after each turn was on the device and visited; a turn that is not wanted stays where it is."""
        table, states, aside = seating.table, list(seating.states), seating.aside
        for index, waiting in enumerate(states):
            turn = Turn(self._turns.seats_of(index), seating.iteration, table, waiting, aside)
            if wanted(turn):
                turn = visit(turn._replace(state=self._turns.to_device(waiting)))
                table, states[index], aside = turn.table, self._turns.to_host(turn.state), turn.aside
        return seating._replace(table=table, states=tuple(states), aside=aside)

    def _round(self, seating: Seating) -> tuple[Seating, list[StepMetrics]]:
        """One round of every turn's steps, each followed by validation, write-back and new seats."""
        by_turn: list[list[StepMetrics]] = []

        def visit(turn: Turn) -> Turn:
            turn, metrics = self._steps(turn)
            by_turn.append(metrics)
            return self._seat(self._write_back(turn))

        seating = self._each_turn(seating, visit, lambda turn: any(user is not None for user in turn.users))
        by_turn = self._placement.host(by_turn)
        longest = max(map(len, by_turn))
        metrics = [
            jax.tree.map(lambda *leaves: np.concatenate(leaves), *(steps[at] for steps in by_turn if at < len(steps)))
            for at in range(longest)
        ]
        return seating._replace(iteration=seating.iteration + longest), metrics

    def _steps(self, turn: Turn) -> tuple[Turn, list[StepMetrics]]:
        """A round's steps, and validation. A round is over where all its members are."""
        # Each member's own: who continues with what was kept does not begin with the first batch.
        begun_N, active_N, most_N = self._placement.host(
            (turn.state.step, turn.state.active, turn.state.hparams.max_steps)
        )
        left = int(np.max(np.where(active_N, most_N - begun_N, 0)))
        length = max(1, min(self._config.round_length, left))
        users, metrics = tuple(turn.users), []
        state = fit(
            turn.state,
            steps=length,
            step=lambda state, batch: self._programs.step(self._base, self._shared, state, batch),
            batches=self._batches,
            # The next round's first batch too, which is the right one where nobody leaves a seat.
            key=lambda index: (users, tuple((begun_N + np.int32(index)).tolist())),
            continues=True,
            on_step=lambda done, state, step_metrics: metrics.append(step_metrics),
        )
        return self._validate(turn._replace(iteration=turn.iteration + length, state=state)), metrics

    def _make_batch(self, key: tuple[tuple[str | None, ...], tuple[int, ...]]) -> Batch:
        users, steps = self._placement.local(key[0]), self._placement.local(key[1])
        return self._placement.rows(self._data.population(users, steps, self._config.accumulate))

    def _validate(self, turn: Turn) -> Turn:
        if self._programs.observe is None:
            return turn
        rows = self._config.validation_rows
        batch = self._data.evaluation(self._placement.local(turn.users), "validation", max_rows=rows)
        # A fixed number of rows: otherwise the population's longest slice would decide a shape, and recompile.
        batch = jax.tree.map(lambda leaf: pad_rows(leaf, rows), batch)
        rows = self._placement.rows(batch)
        return turn._replace(state=self._programs.validated(self._base, self._shared, turn.state, rows))

    def _write_back(self, turn: Turn) -> Turn:
        active = self._placement.host(turn.state.active)
        done = [slot for slot, user in enumerate(turn.users) if user is not None and not active[slot]]
        # To the host at once: a user who has finished takes no more of the device's memory.
        for slot in done:
            members = self._programs.gather_member(turn.state, np.int32(slot))
            user = turn.users[slot]
            if user is not None and self._placement.owns(slot):
                self._writer.put(Finished(user, *jax.device_get(self._placement.gathered(members, slot))))
        return turn._replace(table=turn.table.release([turn.seats[slot] for slot in done]))

    def _seat(self, turn: Turn) -> Turn:
        """Users of the queue in the free seats; one who cannot be trained is set aside, and the next one is seated."""
        anyone = False
        while True:
            table, seated = turn.table.admit(self._queue, turn.seats)
            if not seated:
                break
            found = [(turn.seats.index(seat), user) for seat, user in seated]
            self._source.prefetch([user for slot, user in found if self._placement.holds(slot)])
            if self._group.count == 1:  # whose slot will be free first, and so whose user they are, is not known before
                self._source.prefetch(self._queue[table.next : table.next + self._config.slots])
            started = {user: self._source.start(user) for slot, user in found if self._placement.holds(slot)}
            members, aside = self._agreed(started)
            vacant = [turn.seats[slot] for slot, user in found if user in aside]
            told = tuple(aside[user] for _, user in found if user in aside)
            turn = turn._replace(table=table.release(vacant), aside=turn.aside + told)
            for slot, user in found:
                if user not in aside:
                    placed = self._placement.insertable(slot, members.get(user), turn.state)
                    turn = turn._replace(state=self._programs.insert_member(turn.state, np.int32(slot), placed))
                    anyone = True
        # The start counts as a candidate: a user whom training does not help keeps what they had.
        return self._validate(turn) if anyone else turn

    def _agreed(
        self, started: dict[str, PopulationState | SetAside]
    ) -> tuple[dict[str, PopulationState], dict[str, SetAside]]:
        """(this process's members, who cannot be trained as any process found)."""
        own = [one.to_dict() for one in started.values() if isinstance(one, SetAside)]
        aside = {one["user"]: SetAside(**one) for part in self._group.gather(own) for one in part}
        return {user: one for user, one in started.items() if not isinstance(one, SetAside)}, aside


def pad_rows(leaf_NxMxT: np.ndarray, rows: int) -> np.ndarray:
    """Zero rows (padding, weight 0) up to exactly `rows`, or the first `rows`."""
    missing = max(0, rows - leaf_NxMxT.shape[1])
    return np.pad(leaf_NxMxT[:, :rows], ((0, 0), (0, missing), (0, 0)))
