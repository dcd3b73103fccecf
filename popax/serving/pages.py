"""Pages of the KV cache: who holds which, and which full ones a later prompt may read instead of computing them.

A page is known by a digest over everything that made its keys and values: the scope (tenant, base, the adapters'
content digests with their weights) and all tokens from the first one to its last. Names and revision numbers are not
in it: an adapter that was loaded anew, rolled back, or deleted and made again can never meet what another's bytes made.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from popax.errors import PopulationError

Digest = bytes


@dataclasses.dataclass
class PageCounters:
    """Tokens of prompts that were asked for, of which so many were found; pages that were let go for new ones."""

    asked: int = 0
    found: int = 0
    evictions: int = 0


def scope_digest(tenant: str, base_digest: str, adapters: Iterable[tuple[str, float]] = ()) -> Digest:
    """What the keys and values of a prompt depend on besides its tokens. adapters: (content digest, weight) of each.

    The tenant is in it so that not even the time of an answer tells one tenant what another has asked.
    """
    hashed = hashlib.sha256()
    for part in (tenant, base_digest, *(f"{digest}*{weight!r}" for digest, weight in adapters)):
        encoded = part.encode("utf-8", "surrogatepass")
        hashed.update(len(encoded).to_bytes(8, "big") + encoded)
    return hashed.digest()


class PagePool:
    """`count` pages of `size` tokens. Held by sequences (several may read one), kept for prefixes, or free.

    Not safe between threads: the engine's own has it.
    """

    def __init__(self, count: int, size: int):
        if count < 1 or size < 1:
            raise PopulationError(f"{count} pages of {size} tokens: at least 1 of each")
        self.count, self.size, self.counters = count, size, PageCounters()
        self._free = list(range(count))[::-1]
        self._holders: collections.Counter[int] = collections.Counter()
        self._page_of: dict[Digest, int] = {}
        self._digest_of: dict[int, Digest] = {}
        self._scope_of: dict[int, Digest] = {}
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()  # kept, held by nobody

    @property
    def available(self) -> int:
        """Pages that `take` can give now."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Pages that a sequence holds."""
        return len(self._holders)

    def find(self, scope: Digest, tokens: Sequence[int]) -> tuple[list[int], list[Digest]]:
        """Hold the pages with the longest known prefix of the tokens, the last token never among them (it is computed,
        since its logits are wanted): (the pages, the digest of each)."""
        pages, digests = [], []
        digest, self.counters.asked = scope, self.counters.asked + len(tokens)
        for at in range((len(tokens) - 1) // self.size):
            digest = self._chained(digest, tokens[at * self.size : (at + 1) * self.size])
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
            digests.append(digest)
        for page in pages:
            self._idle.pop(page, None)
            self._holders[page] += 1
        self.counters.found += len(pages) * self.size
        return pages, digests

    def take(self, count: int) -> list[int] | None:
        """Hold so many pages of nobody's, those that were unused longest; None where there are not so many."""
        if count > self.available:
            return None
        taken = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def keep(self, scope: Digest, before: Digest | None, tokens: Sequence[int], page: int) -> Digest:
        """A page that is held is full: these are its tokens, `before` the digest of the one before it (None: the first
        one). Returns its own. Where the same content is known already, this page stays its sequence's alone."""
        digest = self._chained(scope if before is None else before, tokens)
        if digest not in self._page_of:
            self._page_of[digest], self._digest_of[page], self._scope_of[page] = page, digest, scope
        return digest

    def release(self, pages: Sequence[int]) -> None:
        """The inverse of one `find` or `take`. The later pages of a prefix are let go before the earlier ones."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._digest_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def forget(self, scope: Digest | None = None) -> int:
        """Let go of what is kept of a scope, or of all; who holds a page goes on, and nobody finds it. Returns how many
        pages were known."""
        known = [page for page in self._digest_of if scope is None or self._scope_of[page] == scope]
        for page in known:
            self._unname(page)
            if page in self._idle:
                del self._idle[page]
                self._free.append(page)
        return len(known)

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        self._unname(page)
        self.counters.evictions += 1
        return page

    def _unname(self, page: int) -> None:
        del self._page_of[self._digest_of.pop(page)]
        del self._scope_of[page]

    def _chained(self, before: Digest, tokens: Sequence[int]) -> Digest:
        return hashlib.sha256(before + np.asarray(tokens, "<i4").tobytes()).digest()
