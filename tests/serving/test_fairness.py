"""Whose turn it is: counters that are computed by hand."""

from popax.serving.fairness import NEW_TOKEN, PROMPT_TOKEN, TenantCounters


def waiting(**served):
    """Tenants who wait, and what each was served since they all began: counted as a prompt's tokens."""
    counters = TenantCounters()
    for tenant in served:
        counters.wait(tenant)
    for tenant, tokens in served.items():
        counters.serve(tenant, prompt=tokens)
    return counters


def test_who_was_served_least_is_next_and_a_generated_token_counts_as_two():
    assert (PROMPT_TOKEN, NEW_TOKEN) == (1.0, 2.0)
    counters = waiting(a=5, b=0, c=1, d=0)
    counters.serve("b", new=3)
    counters.serve("c", new=1)
    assert counters.turns() == ["d", "c", "a", "b"]  # 0, 1 + 2, 5, 6
    counters.serve("c", prompt=2)
    assert counters.turns() == ["d", "a", "c", "b"]  # c has 5 as a has: by name
    counters.serve("a", prompt=1, new=1)
    assert counters.turns() == ["d", "c", "b", "a"]


def test_only_who_waits_has_a_turn_and_as_long_as_a_request_waits():
    counters = TenantCounters()
    counters.wait("a"), counters.wait("a"), counters.wait("b")
    assert (counters.waiting("a"), counters.waiting("b"), counters.waiting("nobody")) == (2, 1, 0)
    counters.leave("a")
    assert (counters.waiting("a"), counters.turns()) == (1, ["a", "b"])
    counters.leave("a")
    assert (counters.waiting("a"), counters.turns()) == (0, ["b"])


def test_a_newcomer_starts_level_with_the_least_of_those_who_wait():
    counters = waiting(much=90, less=40, gone=10)
    counters.leave("gone")  # its 10 are no measure: it does not wait
    counters.wait("new")
    counters.serve("new", prompt=1)
    assert counters.turns() == ["less", "new", "much"]  # 40, 41, 90


def test_who_comes_back_keeps_what_it_was_served_where_that_is_more():
    counters = waiting(ahead=100, other=30)
    counters.leave("ahead")
    counters.wait("ahead")
    counters.serve("other", prompt=69)
    assert counters.turns() == ["other", "ahead"]  # 99, 100
    counters.serve("other", prompt=2)
    assert counters.turns() == ["ahead", "other"]


def test_a_second_request_of_who_waits_changes_no_counter():
    """It has not come back from a pause: the others' counters are no floor for it."""
    counters = waiting(behind=0, ahead=50)
    counters.wait("behind")
    counters.leave("behind")
    counters.wait("behind")
    counters.serve("behind", prompt=49)
    assert counters.turns() == ["behind", "ahead"]
    alone = waiting(one=7, two=50)
    alone.leave("two")
    alone.wait("one")  # of those who wait it is the least itself
    alone.wait("two")
    alone.serve("one", prompt=42)
    assert alone.turns() == ["one", "two"]  # 49, 50


def test_with_nobody_waiting_the_least_who_ever_did_is_the_measure():
    counters = waiting(much=90, less=40)
    counters.leave("much"), counters.leave("less")
    counters.wait("new")  # at 40
    counters.wait("much"), counters.wait("less")
    assert counters.turns() == ["less", "new", "much"]  # 40 both, 90
    counters.serve("less", prompt=49)
    counters.serve("new", prompt=51)
    assert counters.turns() == ["less", "much", "new"]  # 89, 90, 91


def test_the_first_of_all_starts_at_nothing():
    counters = waiting(first=1)
    counters.leave("first")
    counters.serve("unknown", prompt=3)  # what ends after its tenant has left is counted all the same
    counters.wait("unknown"), counters.wait("first")
    assert counters.turns() == ["first", "unknown"]  # level at 3, by name
    counters.serve("first", prompt=1)
    assert counters.turns() == ["unknown", "first"]
