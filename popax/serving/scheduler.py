"""Who is in the next step: admission of those who wait, pages for those who run, and the step's rows and groups.

Pure bookkeeping: no device, no threads, no clock but what it is given. The engine's thread has it.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from popax.errors import QueueFullError
from popax.serving.fairness import TenantCounters
from popax.serving.pages import PagePool
from popax.serving.request import Answer

_LOOK = 32  # waiting requests of a tenant that are looked at in a step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """rows: answers that run at once. groups, width: of prompts' tokens in a step. waiting, waiting_per_tenant:
    requests in the queue, beyond which one is refused. starving_s: who has waited so long for a slot goes before all
    others."""

    rows: int
    groups: int
    width: int
    waiting: int = 1024
    waiting_per_tenant: int = 256
    starving_s: float = 2.0


class Part(NamedTuple):
    """`count` tokens of an answer from `start` on, in one group of a step."""

    answer: Answer
    start: int
    count: int


class Plan(NamedTuple):
    """rows: who decodes. parts: what of prompts is computed, a group each."""

    rows: list[Answer]
    parts: list[Part]

    @property
    def answers(self) -> list[Answer]:
        """All that are in the step, each once."""
        return list(dict.fromkeys([*self.rows, *(part.answer for part in self.parts)]))


class Scheduler:
    """Waiting answers by tenant, and those that run.

    begin(answer) asks for its adapters' rows, where that has not been done; hold(answer) gives it its adapters' slots,
    False where they are not free; release(answer) gives them back.
    """

    def __init__(
        self,
        limits: Limits,
        pages: PagePool,
        begin: Callable[[Answer], None],
        hold: Callable[[Answer], bool],
        release: Callable[[Answer], None],
    ):
        self.limits, self.pages = limits, pages
        self.running: list[Answer] = []
        self.tenants = TenantCounters()
        self.preempted = 0
        self._begin, self._hold, self._release = begin, hold, release
        self._queues: dict[str, list[Answer]] = collections.defaultdict(list)
        self.waiting = 0  # in all queues; this and `tenants.waiting` may be read by any thread

    def waiters(self) -> Iterator[Answer]:
        """All who wait, in no particular order."""
        for queue in self._queues.values():
            yield from queue

    def check_room(self, tenant: str, arrived: list[str]) -> None:
        """Raises QueueFullError where the queue has no place for one more of this tenant. arrived: the tenants of those
        who are on their way into it. Any thread may ask."""
        limits, waiting = self.limits, self.waiting + len(arrived)
        own = self.tenants.waiting(tenant) + arrived.count(tenant)
        if waiting >= limits.waiting or own >= limits.waiting_per_tenant:
            raise QueueFullError(
                f"{waiting} requests wait (limit {limits.waiting}), {own} of this tenant (limit "
                f"{limits.waiting_per_tenant}): ask again later"
            )

    def enqueue(self, answer: Answer) -> None:
        """Into the queue of its tenant."""
        self._queues[answer.request.tenant].append(answer)
        self.tenants.wait(answer.request.tenant)
        self.waiting += 1

    def remove(self, answer: Answer) -> None:
        """An answer is over: what it held is free."""
        if answer in self.running:
            self.running.remove(answer)
            self._let_go(answer)
        elif answer in self._queues.get(answer.request.tenant, ()):
            self._dequeue(answer)

    def plan(self, now: float) -> Plan:
        """The next step: first those who run, then who can be admitted."""
        self._make_room()
        self._admit(now)
        rows = [answer for answer in self.running if answer.decodes]
        return Plan(rows, self._parts())

    def _make_room(self) -> None:
        """A page for each token to come; who came last waits again where there are too few."""
        for answer in list(self.running):
            if answer not in self.running or not answer.decodes:
                continue
            while (lacking := answer.pages_for(len(answer.tokens), self.pages.size)) > 0:
                if (taken := self.pages.take(lacking)) is not None:
                    answer.pages += taken
                    break
                victim = min(self.running, key=lambda one: (one.request.priority, -one.number))
                self._preempt(victim)
                if victim is answer:
                    break

    def _preempt(self, answer: Answer) -> None:
        """Back into the queue, with what it has written: its keys and values are computed again."""
        self.preempted += 1
        self.running.remove(answer)
        self._let_go(answer)
        self.enqueue(answer)

    def _admit(self, now: float) -> None:
        starving = [
            answer
            for answer in self.waiters()
            if answer.ready and answer.blocked_since and now - answer.blocked_since > self.limits.starving_s
        ]
        first = min(starving, key=lambda answer: answer.blocked_since, default=None)
        if first is not None and not self._try(first, now):
            return  # nobody else takes a slot until this one has one
        while len(self.running) < self.limits.rows and any(self._admit_of(tenant, now) for tenant in self._turns()):
            pass

    def _turns(self) -> list[str]:
        return [tenant for tenant in self.tenants.turns() if self._queues[tenant]]

    def _admit_of(self, tenant: str, now: float) -> bool:
        order = sorted(self._queues[tenant], key=lambda answer: (-answer.request.priority, answer.number))
        return any(self._try(answer, now) for answer in order[:_LOOK])

    def _try(self, answer: Answer, now: float) -> bool:
        """Admit this one: its adapters are loaded, and pages and slots are free."""
        if answer.loading is None:
            self._begin(answer)
        if not answer.ready or len(self.running) >= self.limits.rows:
            return False
        # Whose prompt's probabilities are wanted: every token of it is computed.
        pages, digests = ([], []) if answer.request.prompt_logps else self.pages.find(answer.scope, answer.tokens)
        # One more than the prompt takes, so that the first tokens do not push somebody out again.
        lacking = -(-(len(answer.tokens) + 1) // self.pages.size) - len(pages)
        taken = self.pages.take(lacking)
        if taken is None or not self._hold(answer):
            self.pages.release([*pages, *(taken or [])])
            answer.blocked_since = answer.blocked_since or now
            return False
        answer.pages, answer.digests = [*pages, *taken], digests
        answer.computed = len(pages) * self.pages.size
        answer.blocked_since = 0.0
        answer.timing = answer.timing._replace(admitted=answer.timing.admitted or now)
        self._dequeue(answer)
        # Charged at once: one tenant's line of requests does not take all free rows of this step.
        self.tenants.serve(answer.request.tenant, prompt=answer.left)
        self.running.append(answer)
        return True

    def _parts(self) -> list[Part]:
        """Groups for the prompts of those who run, in the order in which they were admitted."""
        parts: list[Part] = []
        for answer in self.running:
            if answer.decodes:
                continue
            at = answer.computed
            while at < len(answer.tokens) and len(parts) < self.limits.groups:
                count = min(self.limits.width, len(answer.tokens) - at)
                parts.append(Part(answer, at, count))
                at += count
        return parts

    def _let_go(self, answer: Answer) -> None:
        self.pages.release(answer.pages)
        answer.pages, answer.digests, answer.computed, answer.prompt_records = [], [], 0, []
        self._release(answer)

    def _dequeue(self, answer: Answer) -> None:
        tenant = answer.request.tenant
        self._queues[tenant].remove(answer)
        self.tenants.leave(tenant)
        self.waiting -= 1
        if not self._queues[tenant]:
            del self._queues[tenant]


def finished_step(plan: Plan, rows: int, pages: PagePool, tenants: TenantCounters) -> list[tuple[Answer, int]]:
    """After a step of so many rows: name pages that are full. Returns who has a new token, and in which sampled row."""
    sampled = []
    for at, answer in enumerate(plan.rows):
        answer.computed += 1
        sampled.append((answer, at))
    for at, (answer, start, count) in enumerate(plan.parts):
        answer.computed = start + count
        if not answer.left:
            sampled.append((answer, rows + at))
    for answer in plan.answers:
        for number in range(len(answer.digests), answer.computed // pages.size):
            tokens = answer.tokens[number * pages.size : (number + 1) * pages.size]
            before = answer.digests[-1] if answer.digests else None
            answer.digests.append(pages.keep(answer.scope, before, tokens, answer.pages[number]))
    for answer, _ in sampled:
        tenants.serve(answer.request.tenant, new=1)
    return sampled


def expired(scheduler: Scheduler) -> list[Answer]:
    """Those who run or wait beyond their deadline."""
    now = time.monotonic()
    everybody = [*scheduler.running, *scheduler.waiters()]
    return [answer for answer in everybody if answer.request.deadline is not None and answer.request.deadline < now]
