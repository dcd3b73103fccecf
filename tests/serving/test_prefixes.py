"""Prefixes that are read instead of computed: only where all that made them is the same (acceptance 5 of serving)."""

import numpy as np
import pytest

from popax.serving.request import Term
from tests.serving.world import COHORTS, ask, prompt_of

PROMPT = prompt_of(11, 50)
COUNT = 10


def found(engine, work) -> int:
    """How many tokens the work took from kept pages."""
    before = engine.state().pages.found
    work()
    return engine.state().pages.found - before


@pytest.mark.parametrize("user", [0, 5], ids=["lora", "delta_mem"])
def test_a_second_question_reads_what_the_first_computed(world, engine, user):
    """delta_mem: what it has remembered at the end of the kept pages is kept with them."""
    terms = world.terms(world.users[user])
    first = ask(engine, PROMPT, terms=terms, tenant="t1", max_new_tokens=COUNT)
    told = []
    assert found(engine, lambda: told.append(ask(engine, PROMPT, terms=terms, tenant="t1", max_new_tokens=COUNT))) == 48
    assert told[0].tokens == first.tokens
    # What was written is a prefix too: the conversation goes on.
    longer = [*PROMPT, *first.tokens, 1, 2, 3]
    assert found(engine, lambda: told.append(ask(engine, longer, terms=terms, tenant="t1", max_new_tokens=4))) == 56
    assert told[1].tokens == world.alone(longer, 4, world.users[user])


def test_nothing_is_shared_across_tenants_users_weights_or_the_base(world, engine):
    one, other = world.terms(world.users[0]), world.terms(world.users[4])
    half = world.terms((world.users[0], 0.5))
    asked = [("t2", one), ("t3", one), ("t2", other), ("t2", ()), ("t2", half), ("t2", (*one, *other))]
    for tenant, terms in asked:
        assert found(engine, lambda t=tenant, a=terms: ask(engine, PROMPT, terms=a, tenant=t, max_new_tokens=1)) == 0
    for tenant, terms in asked:
        assert found(engine, lambda t=tenant, a=terms: ask(engine, PROMPT, terms=a, tenant=t, max_new_tokens=1)) == 48


def test_a_new_revision_a_rollback_and_a_new_user_of_the_name_meet_no_stale_keys(world, engine):
    """Each of them answers as `generate` does with exactly its bytes, with everybody's prefixes hot."""
    rng, user = np.random.default_rng(21), "acme/changing"

    def says() -> list[int]:
        terms = (Term(world.manifest(user, "promoted")),)
        answers = [ask(engine, PROMPT, terms=terms, tenant="acme", max_new_tokens=COUNT).tokens for _ in range(2)]
        assert answers[0] == answers[1] == world.alone(PROMPT, COUNT, user, "promoted")
        return answers[0]

    world.commit(user, COHORTS[0], rng)
    first = says()
    world.commit(user, COHORTS[0], rng)
    second = says()
    assert second != first
    world.catalog.rollback(user, 1)
    assert says() == first
    world.catalog.delete(user)
    engine.forget_prefixes()
    world.commit(user, COHORTS[0], rng)  # revision 1 again, of another
    third = says()
    assert third not in (first, second)


def test_two_tenants_with_the_same_user_id_are_two_users(world, engine):
    rng = np.random.default_rng(22)
    for tenant in ("acme", "zeta"):
        world.commit(f"{tenant}/same", COHORTS[1], rng)
    answers = {}
    for _ in range(2):
        for tenant in ("acme", "zeta"):
            told = ask(engine, PROMPT, terms=world.terms(f"{tenant}/same"), tenant=tenant, max_new_tokens=COUNT)
            assert told.tokens == world.alone(PROMPT, COUNT, f"{tenant}/same")
            answers[tenant] = told.tokens
    assert answers["acme"] != answers["zeta"]
