"""The engine: many users in one batch, each answered as if alone (invariant 5), and nothing compiled meanwhile."""

import dataclasses
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from popax.adapters.cohort import Cohort
from popax.errors import BaseMismatchError, CorruptRevisionError, QueueFullError, ServingError, UnavailableError
from popax.serving.generate import generate
from popax.serving.programs import CompilationCounter, EngineShapes
from popax.serving.request import GenerationRequest, Reason, Term
from popax.serving.sampling import Sampling
from popax.store.records import row_key
from tests.serving.world import COHORTS, Listener, ask, prompt_of, together

COUNT = 12


def idle(engine):
    """The pages and slots are as at the start."""
    assert engine.wait_idle(60.0)
    state = engine.state()
    assert (state.running, state.waiting, state.pages_held) == (0, 0, 0)
    assert state.pages_available == state.pages_total
    for residency in engine.rooms.residencies.values():
        assert not any(one and one["held"] for one in residency.occupants())


def test_sixty_four_users_in_one_batch_are_each_user_alone(world, engine):
    """Acceptance 1: mixed methods and ranks, prompts of all lengths, base-only rows among them; nothing compiles."""
    compiled = CompilationCounter()
    wanted = [*world.users, *[None] * 8]
    prompts = [prompt_of(at, 1 + at * 5 % 60) for at in range(len(wanted))]
    listeners = [
        Listener(
            engine,
            GenerationRequest(
                tokens=tuple(prompt), terms=world.terms(user) if user else (), max_new_tokens=COUNT, tenant=str(at % 3)
            ),
        )
        for at, (user, prompt) in enumerate(zip(wanted, prompts, strict=True))
    ]
    told = [listener.all() for listener in listeners]
    assert compiled.count == 0
    for user, prompt, one in zip(wanted, prompts, told, strict=True):
        assert one.last.reason is Reason.LENGTH
        assert one.tokens == world.alone(prompt, COUNT, user), user
    idle(engine)


def test_base_only_rows_are_the_bases_own_bits(world, engine):
    """Beside users of every cohort, or beside the base alone: the same log-probabilities, bit for bit."""

    def records(others):
        plain = [GenerationRequest(tokens=tuple(prompt_of(7, 20)), max_new_tokens=COUNT, top=3, tenant="fresh")]
        requests = [
            GenerationRequest(
                tokens=tuple(prompt_of(at, 9)), max_new_tokens=COUNT, terms=terms, tenant=f"{at}{bool(terms)}"
            )
            for at, terms in enumerate(others)
        ]
        engine.forget_prefixes()
        listeners = together(engine, [*requests, *plain])
        return [listener.all() for listener in listeners][-1].records

    users = [world.terms(user) for user in world.users[:6]]
    assert records(users) == records([()] * 6)


@pytest.fixture(scope="module")
def tight(world):
    """Four rows, three slots a cohort, a host tier of a few rows, pages for two long answers: everything runs short."""
    shapes = EngineShapes(rows=(2, 4), groups=2, width=8, context=128, contexts=(64,), page=8, pages=20)
    engine = world.engine(shapes=shapes, slots=3, host_bytes=1 << 16)
    yield engine
    engine.close()
    engine.rooms.close()


@dataclasses.dataclass(frozen=True)
class Visit:
    """Somebody's request after so many steps; they hang up after so many events, or never."""

    user: int
    prompt: int
    wait: int
    leaves: int | None


VISITS = st.lists(
    st.builds(
        Visit,
        user=st.integers(-1, 63),
        prompt=st.integers(0, 7),
        wait=st.integers(0, 4),
        leaves=st.none() | st.integers(0, 8),
    ),
    min_size=1,
    max_size=14,
)


@pytest.mark.slow
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(visits=VISITS)
def test_whoever_comes_and_goes_everybody_gets_their_own(world, tight, expected, visits):
    """Acceptance 1 and 3: random arrivals, cancellations, evictions and preemptions; nothing is left over."""
    listeners = []
    for visit in visits:
        seen = tight.state().counters.steps
        deadline = time.monotonic() + 0.05  # where nothing runs there are no steps to wait for
        while tight.state().counters.steps < seen + visit.wait and time.monotonic() < deadline:
            time.sleep(0.001)
        user = world.users[visit.user] if visit.user >= 0 else None
        prompt = tuple(prompt_of(visit.prompt, 3 + visit.prompt * 9))
        terms = world.terms(user) if user else ()
        request = GenerationRequest(tokens=prompt, max_new_tokens=COUNT, terms=terms, tenant=str(visit.user % 3))
        listeners.append((visit, Listener(tight, request)))
    for visit, listener in listeners:
        if visit.leaves is not None:
            while len(listener.seen) < visit.leaves and (not listener.seen or listener.seen[-1].reason is None):
                listener.next()
            tight.cancel(listener.answer)
        told = listener.all()
        alone = expected(visit.user, visit.prompt)
        assert told.last.error is None
        if told.last.reason is Reason.CANCELLED:
            assert told.tokens == alone[: len(told.tokens)]
        else:
            assert told.tokens == alone
    idle(tight)


@pytest.fixture(scope="module")
def expected(world):
    known = {}

    def of(user: int, prompt: int) -> list[int]:
        if (user, prompt) not in known:
            tokens = prompt_of(prompt, 3 + prompt * 9)
            known[user, prompt] = world.alone(tokens, COUNT, world.users[user] if user >= 0 else None)
        return known[user, prompt]

    return of


def test_who_is_pushed_out_for_pages_goes_on_where_it_was(world, tight):
    """Three answers of 100 tokens want more pages than there are: the last one waits, and its text does not change."""
    before = tight.state().preempted
    prompts = [prompt_of(90 + at, 20) for at in range(3)]
    listeners = [Listener(tight, GenerationRequest(tokens=tuple(prompt), max_new_tokens=80)) for prompt in prompts]
    for prompt, listener in zip(prompts, listeners, strict=True):
        assert listener.all().tokens == world.alone(prompt, 80)
    assert tight.state().preempted > before
    idle(tight)


def test_a_sum_of_adapters_is_exact(world, engine):
    """acme + 0.5 other, of one cohort and of two, against a base with both deltas added to its weights."""
    for first, second in (("acme/user-1", "acme/user-7"), ("acme/user-1", "zeta/user-2")):
        params = world.base.params
        for user, weight in ((first, 1.0), (second, 0.5)):
            adapter, manifest = world.catalog.load(user)
            stored = world.catalog.cohort_of(manifest)
            cohort, shared = Cohort(stored.config, tuple(stored.specs.values())), world.catalog.shared(stored)
            for site in cohort.specs:
                w = world.base.model.site_weight(params, site)
                delta = cohort.merge(site, w, jax.tree.map(np.asarray, adapter), shared)[0] - w
                params = world.base.model.with_site_weight(params, site, w + np.float32(weight) * delta)
        prompt = prompt_of(3, 17)
        [row] = generate(world.base.model, params, [prompt], max_new_tokens=COUNT)
        told = ask(engine, prompt, terms=world.terms(first, (second, 0.5)), max_new_tokens=COUNT)
        assert told.tokens == row.tokens.tolist()
        assert told.tokens != world.alone(prompt, COUNT, first)


def test_a_seed_is_the_answer(world, engine):
    """Sampled tokens depend on the seed and on nothing else; they are those of `generate`."""
    rule, user = Sampling(temperature=1.0, top_k=50, top_p=0.9), world.users[2]
    options = {"sampling": rule, "terms": world.terms(user), "max_new_tokens": COUNT}
    requests = [GenerationRequest(tokens=tuple(prompt_of(1, 9)), seed=seed, **options) for seed in (5, 6, 5)]
    told = together(engine, requests)
    first, second, again = (one.all().tokens for one in told)
    assert first == again == world.alone(prompt_of(1, 9), COUNT, user, sampling=rule, seeds=[5])
    assert second == world.alone(prompt_of(1, 9), COUNT, user, sampling=rule, seeds=[6]) != first


def test_what_a_token_is_worth(world, engine):
    """Records of new tokens and of the prompt's are the model's own log-softmax."""
    prompt, user = prompt_of(4, 21), world.users[0]
    told = ask(engine, prompt, terms=world.terms(user), max_new_tokens=5, top=4, prompt_logps=True)
    whole = [*prompt, *told.tokens]
    logps = world.logps(whole, user)
    records = [*told.events[0].prompt, *told.records]
    assert [record.token for record in records] == whole
    assert records[0].logp is None
    for at, record in enumerate(records[1:]):
        assert record.logp == pytest.approx(logps[at, whole[at + 1]], abs=2e-5)
        best = np.argsort(-logps[at])[:4]
        assert [token for token, _ in record.top] == best.tolist()
        np.testing.assert_allclose([logp for _, logp in record.top], logps[at, best], atol=2e-5)


def test_biases_and_constraints_choose_the_token(world, engine):
    class Even:
        """Even tokens only, and three of them."""

        def __init__(self):
            self.seen = []

        def allowed(self, words_W):
            words_W[:] = 0x55555555

        def accept(self, token):
            self.seen.append(token)

        @property
        def ended(self):
            return len(self.seen) == 3

    told = ask(engine, prompt_of(1, 5), max_new_tokens=9, constraint=Even())
    assert len(told.tokens) == 3
    assert all(token % 2 == 0 for token in told.tokens)
    assert told.last.reason is Reason.STOP
    assert ask(engine, prompt_of(1, 5), max_new_tokens=3, bias=((77, 100.0),)).tokens == [77] * 3
    free = ask(engine, prompt_of(1, 5), max_new_tokens=2).tokens
    assert ask(engine, prompt_of(1, 5), max_new_tokens=1, bias=((free[0], -100.0),)).tokens != free[:1]


def test_answers_end_where_they_are_told_to(world, engine):
    prompt = prompt_of(2, 8)
    free = ask(engine, prompt, max_new_tokens=30)
    assert ask(engine, prompt, max_new_tokens=30, ends=frozenset(free.tokens[4:5])).last.reason is Reason.STOP
    ended = ask(engine, prompt, max_new_tokens=30, ends=frozenset(free.tokens[4:5]))
    assert ended.tokens == free.tokens[: free.tokens.index(free.tokens[4]) + 1]
    assert ask(engine, prompt, max_new_tokens=0, prompt_logps=True, top=0).tokens == []
    stop = free.text[3:6]
    stopped = ask(engine, prompt, max_new_tokens=30, stops=(stop,))
    assert stopped.last.reason is Reason.STOP
    assert stopped.text == free.text[: free.text.index(stop)]
    late = ask(engine, prompt, max_new_tokens=30, deadline=time.monotonic() - 1)
    assert late.last.reason is Reason.DEADLINE


def test_what_can_never_be_answered_is_refused(world, engine):
    for options in (
        {"tokens": ()},
        {"tokens": (1,) * 128},
        {"tokens": (264,)},
        {"tokens": (-1,)},
        {"tokens": (1,), "bias": ((999, 1.0),)},
        {"tokens": (1,), "top": 21},
    ):
        with pytest.raises(ServingError):
            engine.submit(GenerationRequest(**options), print)
    both = GenerationRequest(tokens=(1,), terms=world.terms(world.users[5], world.users[11]))
    with pytest.raises(ServingError, match="2 adapters that remember"):
        engine.submit(both, print)
    manifest = dataclasses.replace(world.manifest(world.users[0]), base_digest="another")
    with pytest.raises((ServingError, BaseMismatchError), match="another"):
        engine.submit(GenerationRequest(tokens=(1,), terms=(Term(manifest),)), print)


def test_a_corrupt_row_is_its_own_users_error(world, engine):
    manifest = world.commit("acme/broken", COHORTS[3], np.random.default_rng(9))
    _flip(world, manifest)
    broken = Listener(engine, GenerationRequest(tokens=(1, 2), terms=(Term(manifest),)))
    whole = Listener(engine, GenerationRequest(tokens=(1, 2), terms=world.terms(world.users[4]), max_new_tokens=4))
    told = broken.all()
    assert told.last.reason is Reason.ERROR
    assert isinstance(told.last.error, CorruptRevisionError)
    assert "acme/broken" in str(told.last.error)
    assert whole.all().tokens == world.alone([1, 2], 4, world.users[4])
    idle(engine)


def _flip(world, manifest):
    """Other bytes in the row's place, as a broken disk has them."""
    cohort = world.catalog.cohort_of(manifest)
    row = cohort.layout.pack(world.catalog.load(manifest.user)[0])
    row[5] ^= 1
    world.catalog._database.shard(manifest.shard).write(row_key(manifest.array, manifest.row), row.tobytes()).result()


def test_the_queue_is_bounded_and_closing_is_orderly(world):
    shapes = EngineShapes(rows=(4,), groups=2, width=8, context=64, contexts=(), page=8)
    engine = world.engine(shapes=shapes, waiting=6, waiting_per_tenant=4)
    gate = threading.Event()
    engine.call(gate.wait)
    time.sleep(0.1)  # the engine's thread stands still: what comes now waits
    listeners = [Listener(engine, GenerationRequest(tokens=(at,), tenant="a", max_new_tokens=40)) for at in range(1, 5)]
    with pytest.raises(QueueFullError, match="4 of this tenant"):
        engine.submit(GenerationRequest(tokens=(1,), tenant="a"), print)
    listeners += [Listener(engine, GenerationRequest(tokens=(at,), tenant="b", max_new_tokens=40)) for at in (1, 2)]
    with pytest.raises(QueueFullError, match="6 requests wait"):
        engine.submit(GenerationRequest(tokens=(1,), tenant="c"), print)
    gate.set()
    assert engine.drain(60.0)
    with pytest.raises(UnavailableError, match="closing"):
        engine.submit(GenerationRequest(tokens=(1,)), print)
    assert {listener.all().last.reason for listener in listeners} == {Reason.LENGTH}
    engine.close()
    engine.rooms.close()


@pytest.mark.slow
def test_rows_that_wait_are_bounded_and_everybody_is_answered(world):
    """Sixty users at once with room for the rows of very few: the others' are read when their turn comes."""
    shapes = EngineShapes(rows=(4,), groups=2, width=8, context=64, contexts=(), page=8)
    engine = world.engine(shapes=shapes, slots=4, host_bytes=30_000)
    most, ask_for = [], engine._incoming._ask

    def watched(answer, rooms, limit):
        ask_for(answer, rooms, limit)
        most.append((engine._incoming._bytes, limit))

    engine._incoming._ask = watched
    users = world.users[:60]
    requests = [GenerationRequest(tokens=(at, 7), max_new_tokens=2, terms=world.terms(u)) for at, u in enumerate(users)]
    told = [listener.all() for listener in together(engine, requests)]
    assert [one.last.reason for one in told] == [Reason.LENGTH] * 60
    assert all(held <= max(limit, 40_000) for held, limit in most)
    assert len(most) > 60  # some had to ask again
    assert engine._incoming._bytes == 0
    engine.close()
    engine.rooms.close()
