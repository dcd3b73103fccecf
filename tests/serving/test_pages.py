"""Pages of the cache: who holds which, what names them, and who finds them again."""

import hashlib

import numpy as np
import pytest

from popax.errors import PopulationError
from popax.serving.pages import PagePool, scope_digest

SCOPE = scope_digest("t", "base")


def kept(pool, tokens, scope=SCOPE):
    """The pages of a prefix that a sequence has computed."""
    pages = pool.take(len(tokens) // pool.size)
    digest = None
    for at, page in enumerate(pages):
        digest = pool.keep(scope, digest, tokens[at * pool.size : (at + 1) * pool.size], page)
    return pages


def test_pages_are_lent_shared_kept_and_taken_again():
    pool = PagePool(6, 2)
    tokens = [1, 2, 3, 4, 5]
    pages = kept(pool, tokens)
    assert (pool.available, pool.held) == (4, 2)
    assert pool.find(SCOPE, tokens)[0] == pages  # both read them
    pool.release(pages)
    assert pool.held == 2
    pool.release(pages)
    assert (pool.available, pool.held) == (6, 0)
    assert pool.find(SCOPE, tokens[:4])[0] == pages[:1]  # the last token is always computed
    pool.release(pages[:1])
    assert pool.find(SCOPE, [1, 2, 9, 9, 9])[0] == pages[:1]
    assert pool.take(6) is None  # one is read
    pool.release(pages[:1])
    taken = pool.take(5)
    assert pool.counters.evictions == 1
    assert pages[1] in taken  # the end of a prefix goes first
    pool.release(taken)
    assert pool.find(SCOPE, tokens)[0] == pages[:1]


def test_what_is_forgotten_is_not_found():
    pool = PagePool(4, 2)
    other = scope_digest("u", "base")
    pool.release(kept(pool, [1, 2, 3]))
    pool.release(kept(pool, [1, 2, 3], other))
    assert pool.forget(SCOPE) == 1
    assert pool.find(SCOPE, [1, 2, 3])[0] == []
    assert len(pool.find(other, [1, 2, 3])[0]) == 1
    assert pool.forget() == 1
    assert pool.available == 3  # who reads a page keeps it
    assert pool.take(4) is None
    assert len(set(pool.take(3))) == 3


def test_the_same_content_twice_is_known_once():
    pool = PagePool(4, 2)
    first, second = kept(pool, [1, 2]), kept(pool, [1, 2])
    pool.release(second)
    assert pool.find(SCOPE, [1, 2, 3])[0] == first
    assert pool.available == 3


def test_scopes_tell_apart_what_concatenation_would_not():
    scopes = [("a", "b"), ("ab", ""), ("", "ab"), ("a", "b", [("x", 1.0)]), ("a", "b", [("x", 0.5)])]
    scopes += [("a", "b", [("x", 1.0), ("y", 1.0)]), ("a", "b", [("xy", 1.0)])]
    assert len({scope_digest(*scope) for scope in scopes}) == len(scopes)


def test_a_scope_is_the_digest_of_its_parts_each_behind_its_length():
    """What is written down here names what is kept: no other process computes it, so nothing but the parts is in it."""
    parts = ("tenant", "base", "x*1.0", "y*0.5")
    hashed = hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part.encode() for part in parts))
    assert scope_digest("tenant", "base", [("x", 1.0), ("y", 0.5)]) == hashed.digest()
    assert scope_digest("\udc80", "base") != scope_digest("", "base")  # a name that is no UTF-8 is a name


def test_a_page_is_named_by_all_tokens_up_to_its_last():
    pool = PagePool(4, 2)
    first = pool.keep(SCOPE, None, [1, 2], pool.take(1)[0])
    second = pool.keep(SCOPE, first, [3, 4], pool.take(1)[0])
    assert first == hashlib.sha256(SCOPE + np.asarray([1, 2], "<i4").tobytes()).digest()
    assert second == hashlib.sha256(first + np.asarray([3, 4], "<i4").tobytes()).digest()
    assert pool.find(SCOPE, [1, 2, 3, 4, 5]) == ([0, 1], [first, second])
    assert pool.find(SCOPE, [9, 9, 3, 4, 5]) == ([], [])  # the same two tokens after others


def test_what_was_asked_for_and_found_is_counted_in_tokens():
    pool = PagePool(4, 2)
    kept(pool, [1, 2, 3, 4])
    pool.find(SCOPE, [1, 2, 3, 4, 5])
    pool.find(SCOPE, [1, 2, 3, 4, 9, 9, 9])
    pool.find(SCOPE, [1, 2, 9])
    pool.find(SCOPE, [7])
    assert (pool.counters.asked, pool.counters.found, pool.counters.evictions) == (5 + 7 + 3 + 1, 4 + 4 + 2 + 0, 0)


def test_pages_are_taken_in_order_all_of_them_or_none():
    pool = PagePool(3, 1)
    assert pool.take(0) == []
    assert pool.take(4) is None
    assert pool.take(3) == [0, 1, 2]
    assert (pool.take(1), pool.held, pool.available) == (None, 3, 0)


def test_what_was_unused_longest_is_taken_first():
    pool = PagePool(3, 1)
    pages = [kept(pool, [token])[0] for token in (5, 6, 7)]
    for page in (pages[1], pages[0], pages[2]):
        pool.release([page])
    assert pool.take(2) == [pages[1], pages[0]]
    assert pool.counters.evictions == 2
    assert pool.find(SCOPE, [7, 0])[0] == [pages[2]]
    assert pool.find(SCOPE, [5, 0])[0] == []


def test_who_reads_a_page_while_it_is_forgotten_gives_it_back_unnamed():
    pool = PagePool(2, 1)
    pages = kept(pool, [5])
    assert pool.forget() == 1
    assert (pool.held, pool.available) == (1, 1)
    pool.release(pages)
    assert (pool.held, pool.available) == (0, 2)
    assert pool.find(SCOPE, [5, 0])[0] == []


@pytest.mark.parametrize(("count", "size"), [(0, 8), (8, 0), (-1, 1)])
def test_no_pages_are_refused(count, size):
    with pytest.raises(PopulationError, match=f"{count} pages of {size} tokens"):
        PagePool(count, size)
    assert PagePool(1, 1).available == 1
