"""Who is in a step: fairness between tenants, priorities, pages, slots, and the queue."""

import concurrent.futures
import time

import numpy as np
import pytest

from popax.errors import QueueFullError
from popax.serving.detokenize import TextStream
from popax.serving.fairness import TenantCounters
from popax.serving.pages import PagePool
from popax.serving.request import Answer, GenerationRequest
from popax.serving.scheduler import _LOOK, Limits, Part, Plan, Scheduler, expired, finished_step


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

    def add(self, tenant="t", length=4, new=2, adapter="", tokens=None, **options):
        drawn = tuple(np.random.default_rng(self.numbers).integers(0, 99, length).tolist())
        request = GenerationRequest(
            tokens=tokens or drawn, tenant=tenant, max_new_tokens=new, stops=(adapter,) if adapter else (), **options
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


def test_each_answer_of_a_plan_is_listed_once():
    bench = Bench()
    one, other = bench.add(), bench.add()
    plan = Plan([one], [Part(other, 0, 4), Part(other, 4, 4), Part(one, 0, 1)])
    assert plan.answers == [one, other]


def test_who_is_on_the_way_into_the_queue_has_a_place_in_it():
    bench = Bench(waiting=4, waiting_per_tenant=2)
    room = bench.scheduler.check_room
    room("a", ["b", "b", "a"])
    for arrived in (["a", "a"], ["b", "b", "c", "c"]):
        with pytest.raises(QueueFullError):
            room("a", arrived)
    bench.add("a")
    room("a", ["b"])
    for arrived in (["a"], ["b", "b", "c"]):
        with pytest.raises(QueueFullError):
            room("a", arrived)


def test_who_is_removed_gives_back_what_it_held_and_leaves_nothing_behind():
    bench = Bench(rows=1)
    running, waiting = bench.add(adapter="x", length=7), bench.add("u")
    bench.step()
    assert (bench.scheduler.running, bench.scheduler.waiting, list(bench.scheduler.waiters())) == (
        [running],
        1,
        [waiting],
    )
    assert (bench.pages.held, bench.slots.held) == (2, [("x",)])
    for _ in range(2):  # who is not there any more is not removed again
        bench.scheduler.remove(running), bench.scheduler.remove(waiting)
        assert (bench.scheduler.running, bench.scheduler.waiting, bench.pages.held, bench.slots.held) == ([], 0, 0, [])
        assert bench.scheduler.tenants.turns() == []
        assert not bench.scheduler._queues  # one for every tenant who ever asked would be a leak


@pytest.mark.parametrize(("length", "pages"), [(3, 1), (4, 2), (5, 2), (7, 2), (8, 3)])
def test_a_prompt_is_admitted_with_a_page_for_its_first_token(length, pages):
    bench = Bench(width=8)
    bench.add(length=length)
    bench.scheduler.plan(1.0)
    assert bench.pages.held == pages


def test_tenants_share_the_rows_of_one_step():
    """What a prompt costs is counted at once: the second row is the other tenant's."""
    bench = Bench(rows=2)
    first, _, other, _ = (bench.add(tenant, length=8) for tenant in "aabb")
    bench.scheduler.plan(1.0)
    assert bench.scheduler.running == [first, other]


def test_a_known_prefix_is_read_and_not_charged_but_where_its_probabilities_are_wanted():
    bench = Bench(rows=4, width=8, groups=8)
    tokens = tuple(range(11))
    bench.add("a", tokens=tokens, new=1)
    bench.step()
    again, asked = bench.add("b", tokens=tokens), bench.add("c", tokens=tokens, prompt_logps=True)
    plan = bench.scheduler.plan(2.0)
    assert (again.pages[:2], len(again.pages)) == ([0, 1], 3)
    assert not set(asked.pages) & {0, 1}
    assert [part for part in plan.parts if part.answer is again] == [Part(again, 8, 3)]
    assert [(part.start, part.count) for part in plan.parts if part.answer is asked] == [(0, 8), (8, 3)]
    bench.scheduler.tenants.wait("b"), bench.scheduler.tenants.wait("c")
    bench.scheduler.tenants.serve("b", prompt=7)
    assert bench.scheduler.tenants.turns() == ["b", "c"]  # 3 + 7 tokens against 11


def test_who_gets_no_slot_holds_no_page_and_knows_since_when():
    bench = Bench(rows=4, slots=1, starving_s=99.0)
    warm = bench.add(adapter="warm", tokens=tuple(range(9)), new=50)
    bench.step(), bench.step(), bench.step()
    cold = bench.add(adapter="cold", tokens=tuple(range(9)))  # it finds two pages of the other's
    for _ in range(2):
        bench.step()
        assert (bench.scheduler.running, cold.pages, cold.blocked_since) == ([warm], [], 4.0)
        assert bench.pages.held == len(warm.pages)
    bench.scheduler.remove(warm)
    assert bench.pages.held == 0
    bench.step()
    assert (bench.scheduler.running, cold.blocked_since, cold.timing.admitted) == ([cold], 0.0, 6.0)


def test_who_has_waited_too_long_for_a_slot_goes_before_all_others():
    """Longer than starving_s, not as long: until then whoever has what they need is admitted."""
    bench = Bench(rows=9, slots=1, starving_s=3.0)
    bench.add(adapter="warm", new=99)
    bench.step()
    bench.add(adapter="cold")
    bench.step()  # blocked since 2.0
    for now in (3.0, 4.0, 5.0):
        plain = bench.add("other", new=99)
        bench.step()
        assert (bench.now, plain in bench.scheduler.running) == (now, True)
    late = bench.add("other")
    bench.step()
    assert late not in bench.scheduler.running


def test_of_those_who_waited_too_long_the_first_is_first():
    bench = Bench(rows=2, slots=1, starving_s=3.0)
    later, sooner = bench.add(adapter="one"), bench.add(adapter="other")
    later.blocked_since, sooner.blocked_since = 2.0, 1.0
    bench.scheduler.plan(100.0)
    assert bench.scheduler.running == [sooner]


def test_who_waited_too_long_is_not_pressed_in_beside_full_rows():
    bench = Bench(rows=2, starving_s=3.0)
    running = [bench.add(new=99), bench.add(new=99)]
    bench.step()
    bench.add().blocked_since = 1.0
    bench.scheduler.plan(100.0)
    assert bench.scheduler.running == running


def test_who_was_never_refused_is_not_starving_however_late_it_is():
    bench = Bench(rows=1, starving_s=3.0)
    bench.now = 1000.0
    bench.scheduler.tenants.wait("often"), bench.scheduler.tenants.wait("seldom")
    bench.scheduler.tenants.serve("often", prompt=99)
    bench.add("often")
    seldom = bench.add("seldom")
    bench.scheduler.plan(1000.0)
    assert bench.scheduler.running == [seldom]


def test_who_is_not_ready_any_more_holds_nobody_up():
    bench = Bench(rows=2, starving_s=3.0)
    lost, plain = bench.add("a"), bench.add("b")
    lost.blocked_since, lost.loading = 1.0, [concurrent.futures.Future()]
    bench.scheduler.plan(100.0)
    assert bench.scheduler.running == [plain]


def test_rows_are_asked_for_when_there_is_a_place_to_run():
    bench = Bench(rows=1)
    waiting = [bench.add(), bench.add()]
    for answer in waiting:
        answer.loading = None
    bench.scheduler.plan(1.0)
    assert bench.begun == waiting
    plain = bench.add("other", new=99)
    bench.scheduler.plan(2.0)
    assert bench.scheduler.running == [plain]
    bench.begun.clear()
    bench.scheduler.plan(3.0)
    assert bench.begun == []


def test_so_many_of_a_tenant_are_looked_at_in_a_step():
    for count, admitted in ((_LOOK - 1, True), (_LOOK, False)):
        bench = Bench(rows=2, slots=1, starving_s=99.0)
        bench.add(adapter="warm", new=99)
        bench.step()
        for _ in range(count):
            bench.add(adapter="cold")
        plain = bench.add()
        bench.step()
        assert (plain in bench.scheduler.running) == admitted


def decoding(bench, *priorities, length=3):
    """Answers whose next token needs a page: the one that each has is full."""
    answers = [bench.add(length=length, new=50, priority=priority) for priority in priorities]
    bench.step(), bench.step()
    assert [(answer.decodes, answer.computed, len(answer.pages)) for answer in answers] == [(True, 4, 1)] * len(answers)
    return answers


def test_who_needs_a_page_takes_it_from_the_last_who_came():
    bench = Bench(rows=3, pages=3)
    first, second, third = decoding(bench, 0, 0, 0)
    admitted = third.timing.admitted
    bench.step()  # the first takes the third's page, the second has nobody to take one from but itself
    assert bench.scheduler.running == [first]
    assert bench.scheduler.preempted == 2
    assert [(answer.computed, answer.pages, answer.digests) for answer in (second, third)] == [(0, [], [])] * 2
    assert len(first.pages) == 2
    assert bench.pages.held == 2
    assert sorted(answer.number for answer in bench.scheduler.waiters()) == [1, 2]
    bench.scheduler.remove(first)
    bench.step()
    assert bench.scheduler.running == [second]
    bench.scheduler.remove(second)
    bench.step()
    assert (bench.scheduler.running, third.timing.admitted) == ([third], admitted)


def test_the_least_priority_gives_its_pages_first():
    bench = Bench(rows=2, pages=2)
    plain, urgent = decoding(bench, 0, 5)
    bench.step()
    assert plain not in bench.scheduler.running
    assert bench.scheduler.running == [urgent]
    assert bench.scheduler.preempted == 1


def test_who_prefills_beside_those_who_decode_keeps_its_pages():
    bench = Bench(rows=2, groups=1, width=4, pages=5)
    [decodes] = decoding(bench, 0)
    prefills = bench.add(length=11, new=1)
    bench.step()
    held = list(prefills.pages)
    assert (len(held), len(decodes.pages)) == (3, 2)
    bench.step()
    assert prefills.pages == held
    assert bench.pages.held == 5


class Charged:
    """In the place of the counters: what each tenant was charged."""

    def __init__(self):
        self.new = []

    def serve(self, tenant, *, prompt=0, new=0):
        assert prompt == 0
        self.new.append((tenant, new))


def test_a_finished_step_names_full_pages_and_says_who_has_a_token():
    """Of 8 rows: who decodes is in its own, whose prompt is done behind them, at the place of its part."""
    bench, charged = Bench(), Charged()
    decodes, begun, ends = bench.add("a", length=3), bench.add("b", length=9), bench.add("c", length=8)
    for answer, pages in ((decodes, [0]), (begun, [1, 2, 3]), (ends, [4, 5, 6])):
        answer.pages = bench.pages.take(len(pages))
        assert answer.pages == pages
    decodes.tokens.append(7)
    decodes.computed = 3
    ends.computed = 2
    plan = Plan([decodes], [Part(begun, 0, 4), Part(ends, 2, 6)])
    assert finished_step(plan, 8, bench.pages, charged) == [(decodes, 0), (ends, 9)]
    assert [answer.computed for answer in (decodes, begun, ends)] == [4, 4, 8]
    assert [len(answer.digests) for answer in (decodes, begun, ends)] == [1, 1, 2]
    assert charged.new == [("a", 1), ("c", 1)]
    for answer, pages in ((decodes, [0]), (begun, [1]), (ends, [4, 5])):
        found, digests = bench.pages.find(b"scope", [*answer.tokens[: 4 * len(pages)], 0])
        assert (found, digests) == (pages, answer.digests)


def test_a_step_further_names_the_next_page_behind_the_first():
    bench = Bench()
    answer = bench.add(length=13)
    answer.pages = bench.pages.take(4)
    for start, count in ((0, 4), (4, 4), (8, 4)):
        finished_step(Plan([], [Part(answer, start, count)]), 8, bench.pages, Charged())
    assert bench.pages.find(b"scope", answer.tokens)[0] == answer.pages[:3]


def test_who_is_beyond_their_deadline_is_over_whether_they_run_or_wait(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 10.0)
    bench = Bench(rows=3)
    late, _, _ = (bench.add(deadline=deadline) for deadline in (9.0, 10.0, None))
    bench.step()
    waits = bench.add(deadline=9.5)
    bench.add(deadline=11.0), bench.add()
    assert expired(bench.scheduler) == [late, waits]
