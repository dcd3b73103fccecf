"""Continuous batching: a thread that takes requests as they come and computes one step after the other for all."""

import concurrent.futures
import contextlib
import copy
import threading
import time
from collections.abc import Callable

from jax.sharding import Mesh

from popax.data.tokenize import Tokenizer
from popax.errors import UnavailableError
from popax.modeling.base import Base
from popax.modeling.virtual import virtual_ids
from popax.serving.batch import filled, records, sampled_record
from popax.serving.checks import check_request, load_error
from popax.serving.counters import EngineCounters, EngineState
from popax.serving.detokenize import TextStream
from popax.serving.incoming import Incoming
from popax.serving.pages import PagePool, scope_digest
from popax.serving.programs import EngineShapes, Programs
from popax.serving.request import Answer, Event, GenerationRequest, Reason
from popax.serving.rooms import Rooms
from popax.serving.scheduler import Limits, Plan, Scheduler, expired, finished_step
from popax.serving.step import StepOutputs

Tell = Callable[[Event], None]
_IDLE_S = 0.05  # how often deadlines are looked at while nothing runs


class Engine:
    """One base, everybody's adapters. `submit` may be called from any thread; `tell` is called by the engine's own, and
    must not wait."""

    def __init__(
        self,
        base: Base,
        tokenizer: Tokenizer,
        rooms: Rooms | None = None,
        *,
        shapes: EngineShapes | None = None,
        waiting: int = 1024,
        waiting_per_tenant: int = 256,
        cache_dtype: str | None = None,
        mesh: Mesh | None = None,
    ):
        shapes = shapes or EngineShapes()
        self.waiting_per_tenant = waiting_per_tenant
        self.base, self.tokenizer, self.rooms, self.shapes = base, tokenizer, rooms, shapes
        cohorts = rooms.cohorts if rooms else ()
        self._programs = Programs(base.model, base.params, cohorts, shapes, cache_dtype=cache_dtype, mesh=mesh)
        self._pages = PagePool(shapes.num_pages, shapes.page)
        limits = Limits(
            rows=max(shapes.rows),
            groups=shapes.groups,
            width=shapes.width,
            waiting=waiting,
            waiting_per_tenant=waiting_per_tenant,
        )
        self._incoming = Incoming(rooms, self._wake)
        self._scheduler = Scheduler(limits, self._pages, self._incoming.in_turn, self._hold, self._release)
        self.counters = EngineCounters()
        self._changed = threading.Condition()
        self._arrived: list[Answer] = []
        self._calls: list[Callable[[], object]] = []
        self._numbers, self._in_flight = 0, 0
        self._closing, self._ending = False, False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="popax-engine", daemon=True)

    @property
    def programs(self) -> Programs:
        """Its compiled steps, and its pages."""
        return self._programs

    def start(self, say: Callable[[str], None] = lambda line: None) -> None:
        """Compile every step, run each once, and begin to answer. Nothing is compiled after this."""
        sets = self.rooms.sets({}, 1) if self.rooms else ()
        self._programs.compile(sets, say)
        for shape in self.shapes.all():
            sets = self.rooms.sets({}, shape.samples) if self.rooms else ()
            self._programs.run(shape, sets, self._programs.inputs(shape))
        self._thread.start()

    def submit(self, request: GenerationRequest, tell: Tell) -> Answer:
        """Take a request; events follow, the last of them with a reason, and none after it.

        Raises ServingError where it can never be answered as it is (too long, another base's or cohort's adapters),
        QueueFullError, and UnavailableError where the engine is closing.
        """
        ahead = tuple(virtual_ids(check_request(request, self.base, self.shapes.context, self.rooms)))
        self._scheduler.check_room(request.tenant, [])  # before anything is read for it
        answer = Answer(request, tell, TextStream.of(self.tokenizer, request.stops), self.scope(request), ahead)
        with self._changed:
            if self._closing or self._failure is not None:
                why = "is closing" if self._failure is None else f"has failed ({type(self._failure).__name__})"
                raise UnavailableError(f"the server {why}, and takes no new requests: ask another one")
            answer.number, self._numbers = self._numbers, self._numbers + 1
            self._scheduler.check_room(request.tenant, [each.request.tenant for each in self._arrived])
            self._incoming.on_arrival(answer)
            self._arrived.append(answer)
            self._in_flight += 1
            self.counters.requests += 1
            self._changed.notify_all()
        return answer

    def cancel(self, answer: Answer) -> None:
        """End an answer early; its last event is told with reason `cancelled`, unless it is over already."""
        answer.cancelled = True
        self._wake()

    def scope(self, request: GenerationRequest) -> bytes:
        """What keys and values of this request depend on besides its tokens."""
        adapters = sorted((term.manifest.digest, term.weight) for term in request.terms)
        return scope_digest(request.tenant, self.base.digest, adapters)

    def forget_prefixes(self) -> None:
        """Let go of all kept pages, as after a deletion: what a user's adapter made of prompts goes with it."""
        self.call(self._pages.forget)

    def call(self, work: Callable[[], object]) -> None:
        """Do this between two steps, in the engine's thread."""
        with self._changed:
            self._calls.append(work)
            self._changed.notify_all()

    def wait_for(self, work: Callable[[], None], timeout_s: float = 60.0) -> None:
        """`call`, and wait until it is done. Raises what it raises."""
        done: concurrent.futures.Future[None] = concurrent.futures.Future()

        def told() -> None:
            try:
                work()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self.call(told)
        done.result(timeout_s)

    def state(self) -> EngineState:
        """What the engine is at."""
        with self._changed:
            return EngineState(
                copy.deepcopy(self.counters),
                copy.copy(self._pages.counters),
                self._pages.held,
                self._pages.available,
                self._pages.count,
                len(self._scheduler.running),
                self._scheduler.waiting + len(self._arrived),
                self._scheduler.preempted,
            )

    @property
    def alive(self) -> bool:
        """Whether it answers: started, and not failed."""
        return self._thread.is_alive() and self._failure is None

    def wait_idle(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing runs or waits; whether that came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._in_flight, timeout_s)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take nothing new and wait for what runs and waits; whether all of it ended in time."""
        with self._changed:
            self._closing = True
        return self.wait_idle(timeout_s)

    def close(self) -> None:
        """End everything that runs or waits (`cancelled`), and the thread."""
        with self._changed:
            self._closing, self._ending = True, True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _hold(self, answer: Answer) -> bool:
        if self.rooms is None or not answer.request.terms:
            return True
        # What could not be read ends in the next turn.
        if load_error(answer) is not None or not self.rooms.hold(answer):
            return False
        self._incoming.drop(answer)
        return True

    def _release(self, answer: Answer) -> None:
        if self.rooms is not None:
            self.rooms.release(answer)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            while not self._ending:
                self._turn()
        except BaseException as error:
            self._failure = error
            raise
        finally:
            reason = Reason.CANCELLED if self._failure is None else Reason.ERROR
            self._take_arrivals()
            for answer in [*self._scheduler.running, *self._scheduler.waiters()]:
                self._end(answer, Event(reason=reason, error=self._failure))

    def _turn(self) -> None:
        self._take_arrivals()
        self._end_early()
        plan = self._scheduler.plan(time.monotonic())
        if plan.rows or plan.parts:
            self._step(plan)
            return
        with self._changed:
            if not (self._arrived or self._calls or self._ending):
                self._changed.wait(_IDLE_S if self._in_flight else None)

    def _take_arrivals(self) -> None:
        with self._changed:
            arrived, self._arrived = self._arrived, []
            calls, self._calls = self._calls, []
            for answer in arrived:
                self._scheduler.enqueue(answer)
        for work in calls:
            work()

    def _end_early(self) -> None:
        everybody = [*self._scheduler.running, *self._scheduler.waiters()]
        for answer in [answer for answer in everybody if answer.cancelled]:
            self._end(answer, Event(reason=Reason.CANCELLED))
        for answer in expired(self._scheduler):
            self._end(answer, Event(text=answer.stream.finish(), reason=Reason.DEADLINE))
        for answer in list(self._scheduler.waiters()):
            if answer.ready and (error := load_error(answer)) is not None:
                self._end(answer, Event(reason=Reason.ERROR, error=error))

    def _step(self, plan: Plan) -> None:
        began = time.perf_counter()
        longest = max(len(answer.pages) for answer in plan.answers)
        shape = self._programs.shape(len(plan.rows), len(plan.parts), longest)
        inputs, owners = filled(self._programs.inputs(shape), shape, plan)
        sets = self.rooms.sets(owners, shape.samples) if self.rooms else ()
        outputs = self._programs.run(shape, sets, inputs)
        with self._changed:
            self.counters.steps += 1
            self.counters.prompt_tokens += sum(part.count for part in plan.parts)
        for answer, made in records(plan, outputs):
            answer.prompt_records += made
        for answer, row in finished_step(plan, shape.rows, self._pages, self._scheduler.tenants):
            self._new_token(answer, row, outputs)
        with self._changed:
            self.counters.step_s += time.perf_counter() - began

    def _new_token(self, answer: Answer, row: int, outputs: StepOutputs) -> None:
        token, request = int(outputs.token_B[row]), answer.request
        if not answer.timing.first:
            answer.timing = answer.timing._replace(first=time.monotonic())
        prompt, answer.prompt_records = tuple(answer.prompt_records), []
        if request.max_new_tokens == 0:
            self._end(answer, Event(reason=Reason.LENGTH, prompt=prompt))
            return
        answer.tokens.append(token)
        self.counters.new_tokens += 1
        if request.constraint is not None:
            request.constraint.accept(token)
        record = sampled_record(outputs, row, token, request.top)
        if token in request.ends:
            self._end(answer, Event(answer.stream.finish(), (record,), Reason.STOP, prompt=prompt))
            return
        text = answer.stream.push(token)
        over = answer.made >= request.max_new_tokens or len(answer.tokens) >= self.shapes.context
        if answer.stream.stopped is not None or (request.constraint is not None and request.constraint.ended):
            self._end(answer, Event(text, (record,), Reason.STOP, prompt=prompt))
        elif over:
            self._end(answer, Event(text + answer.stream.finish(), (record,), Reason.LENGTH, prompt=prompt))
        else:
            self._tell(answer, Event(text, (record,), prompt=prompt))

    def _end(self, answer: Answer, event: Event) -> None:
        self._scheduler.remove(answer)
        self._incoming.drop(answer)
        answer.timing = answer.timing._replace(ended=time.monotonic())
        self._tell(answer, event)
        with self._changed:
            self._in_flight -= 1
            assert event.reason is not None
            self.counters.ended[event.reason] = self.counters.ended.get(event.reason, 0) + 1
            self._changed.notify_all()

    def _tell(self, answer: Answer, event: Event) -> None:
        with contextlib.suppress(Exception):  # who listens is gone: that is their affair, not the other answers'
            answer.tell(event._replace(time=time.monotonic()))
