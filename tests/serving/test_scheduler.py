"""Who is in a step: fairness between tenants, priorities, pages, slots, and the queue."""

import numpy as np
import pytest

from popax.errors import QueueFullError
from popax.serving.detokenize import TextStream
from popax.serving.fairness import TenantCounters
from popax.serving.pages import PagePool
from popax.serving.request import Answer, GenerationRequest
from popax.serving.scheduler import Limits, Scheduler, finished_step


class Slots:
    """`count` adapter slots, a name each."""

    def __init__(self, count):
        self.count, self.held = count, []

    def hold(self, answer):
        name = answer.request.stops
        if name and name not in self.held and len(set(self.held)) >= self.count:
            return False
        self.held += [name] if name else []
        return True

    def release(self, answer):
        if answer.request.stops:
            self.held.remove(answer.request.stops)


class Bench:
    """A scheduler whose steps take no time and make token 7."""

    def __init__(self, rows=2, groups=4, width=4, pages=64, slots=2, **limits):
        self.slots, self.numbers, self.now = Slots(slots), 0, 0.0
        self.ended, self.begun = [], []
        self.pages = PagePool(pages, 4)
        limits = Limits(rows=rows, groups=groups, width=width, **limits)
        self.scheduler = Scheduler(limits, self.pages, self.begun.append, self.slots.hold, self.slots.release)

    def add(self, tenant="t", length=4, new=2, adapter="", **options):
        tokens = tuple(np.random.default_rng(self.numbers).integers(0, 99, length).tolist())
        request = GenerationRequest(
            tokens=tokens, tenant=tenant, max_new_tokens=new, stops=(adapter,) if adapter else (), **options
        )
        answer = Answer(request, print, TextStream(str), b"scope", number=self.numbers)
        self.numbers += 1
        self.scheduler.check_room(tenant, [])
        self.scheduler.enqueue(answer)
        return answer

    def step(self):
        self.now += 1.0
        plan = self.scheduler.plan(self.now)
        for answer, _ in finished_step(plan, self.scheduler.limits.rows, self.pages, self.scheduler.tenants):
            answer.tokens.append(7)
            if answer.made >= answer.request.max_new_tokens:
                self.scheduler.remove(answer)
                self.ended.append(answer)
        return plan

    def run(self):
        for _ in range(1000):
            if not (self.scheduler.running or self.scheduler.waiting):
                return
            self.step()
        raise AssertionError("it does not end")


def test_a_prompt_is_computed_in_groups_beside_those_who_decode():
    bench = Bench()
    first = bench.add(length=3, new=9)
    bench.step()
    second = bench.add(length=30, new=1)
    plan = bench.step()
    assert plan.rows == [first]
    assert [(part.answer, part.start, part.count) for part in plan.parts] == [(second, at, 4) for at in (0, 4, 8, 12)]
    plan = bench.step()
    assert [(part.start, part.count) for part in plan.parts] == [(16, 4), (20, 4), (24, 4), (28, 2)]
    assert bench.ended == [second]


def test_a_tenant_with_few_requests_does_not_wait_for_one_with_many():
    bench = Bench(rows=2)
    heavy = [bench.add("heavy", new=10) for _ in range(20)]
    bench.step()
    light = bench.add("light", new=2)
    bench.run()
    assert bench.ended.index(light) <= 2
    assert {answer.request.tenant for answer in bench.ended} == {"heavy", "light"}
    assert len(heavy) + 1 == len(bench.ended)


def test_served_tokens_are_equal_for_tenants_who_always_ask():
    """The virtual token counter's bound (arXiv 2401.00588, theorem 4.4): the gap does not grow with time."""
    bench = Bench(rows=4)
    for _ in range(60):
        bench.add("short", length=2, new=1)
        bench.add("long", length=16, new=12)
    served = {"short": 0, "long": 0}
    while all(bench.scheduler.tenants.waiting(tenant) for tenant in served):
        before = len(bench.ended)
        bench.step()
        for answer in bench.ended[before:]:
            served[answer.request.tenant] += len(answer.request.tokens) + 2 * answer.made
    assert abs(served["short"] - served["long"]) < 2 * 4 * (16 + 2 * 12)


def test_who_paused_has_saved_nothing_up():
    counters = TenantCounters()
    counters.wait("busy")
    counters.serve("busy", prompt=1000)
    counters.wait("new")
    counters.serve("new", prompt=1)
    assert counters.turns() == ["busy", "new"]
    counters.leave("new")
    counters.serve("busy", prompt=10)
    counters.wait("new")
    counters.serve("new", prompt=1)  # it came back level with the other one, not 1,009 tokens ahead
    assert counters.turns() == ["busy", "new"]


def test_priority_goes_first_within_a_tenant():
    bench = Bench(rows=1)
    plain, urgent = bench.add(), bench.add(priority=5)
    bench.run()
    assert bench.ended == [urgent, plain]


def test_a_cold_user_stalls_nobody_and_is_not_forgotten():
    """While their row is read, others run; with all slots taken they wait, but not for ever."""
    bench = Bench(rows=4, slots=1, starving_s=3.0)
    import concurrent.futures

    row = concurrent.futures.Future()
    cold = bench.add(adapter="cold", new=1)
    cold.loading = [row]
    warm = [bench.add(adapter="warm", new=3) for _ in range(2)]
    bench.step()
    assert bench.scheduler.running == warm
    row.set_result(None)
    for _ in range(12):  # the warm user's requests keep coming, and their slot is never free by itself
        bench.add(adapter="warm", new=3)
        bench.step()
        if cold in bench.ended:
            break
    assert cold in bench.ended


def test_pages_run_out_and_the_last_one_waits_again():
    bench = Bench(rows=2, pages=5)
    first, second = bench.add(length=4, new=12), bench.add(length=4, new=12)
    bench.run()
    assert bench.scheduler.preempted > 0
    assert bench.ended == [first, second]
    assert bench.pages.held == 0
    assert [answer.made for answer in bench.ended] == [12, 12]


def test_a_full_queue_says_whose_it_is():
    bench = Bench(waiting=3, waiting_per_tenant=2)
    bench.add("a"), bench.add("a")
    with pytest.raises(QueueFullError, match="2 of this tenant"):
        bench.add("a")
    bench.add("b")
    with pytest.raises(QueueFullError, match="3 requests wait"):
        bench.add("c")
    bench.run()
    bench.add("a")
