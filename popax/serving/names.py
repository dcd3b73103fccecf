"""What a request calls its model: the base, a user, a revision of theirs, or a weighted sum of several."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from popax.adapters.table import method_of
from popax.errors import RevisionNotFoundError, ServingError
from popax.residency import Request
from popax.serving.pool import BASE_ONLY, parse_request
from popax.serving.request import Term
from popax.store.catalog import Catalog
from popax.store.pointers import PROMOTED, Which

MAX_TERMS = 8
_WEIGHTED = re.compile(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\*(.+)", re.DOTALL)


class Named(NamedTuple):
    """A name as it was given, and the adapters that it means now; () for the base."""

    name: str
    terms: tuple[Term, ...]


class Names:
    """Looks names up in a catalog, for one tenant at a time: what a tenant says is the rest of a user's id, and who is
    another tenant's is as unknown to it as who is nobody."""

    def __init__(self, catalog: Catalog | None, base_digest: str, default: Which = PROMOTED):
        self._catalog, self._base_digest, self._default = catalog, base_digest, default

    def user_of(self, tenant: str, name: str) -> str:
        """The whole id of a tenant's user."""
        return f"{tenant}/{name}" if tenant else name

    def find(self, tenant: str, text: str) -> Named:
        """ "base", "user", "user@7", "user@promoted", "user@TAG", or a sum "alice+0.5*formal-tone" of these.

        A user whose id looks like a sum, or like a revision, is meant before these are. Raises RevisionNotFoundError,
        whose message names nothing but `text`; ServingError for a sum that is none; and what `Catalog.resolve` raises.
        """
        if text == BASE_ONLY:
            return Named(text, ())
        if self._catalog is None or not text:
            raise unknown(text)
        requests = [(self._request(tenant, name), weight) for name, weight in self._parts(tenant, text)]
        named = [(str(request.user), request.revision) for request, _ in requests if request.user is not None]
        try:
            manifests = iter(self._catalog.resolve(named, base_digest=self._base_digest))
        except RevisionNotFoundError as error:
            raise unknown(text) from error
        terms = [Term(next(manifests), weight) for request, weight in requests if request.user is not None]
        if len(requests) > 1 or any(weight != 1.0 for _, weight in requests):
            self._check_sum(terms)
        return Named(text, _summed(terms))

    def _check_sum(self, terms: Sequence[Term]) -> None:
        assert self._catalog is not None
        for term in terms:
            config = self._catalog.cohort_of(term.manifest).config
            if method_of(config).factors is None:
                raise ServingError(f"{config.method} adapters do not add: name one alone, without a weight")

    def _parts(self, tenant: str, text: str) -> list[tuple[str, float]]:
        assert self._catalog is not None
        if ("+" not in text and "*" not in text) or self._catalog.exists(self.user_of(tenant, text)):
            return [(text, 1.0)]
        parts = [weighted(part.strip()) for part in text.split("+")]
        if len(parts) > MAX_TERMS:
            raise ServingError(f"a sum of {len(parts)} adapters: at most {MAX_TERMS}")
        return parts

    def _request(self, tenant: str, name: str) -> Request:
        assert self._catalog is not None
        if name == BASE_ONLY:
            return Request(None)
        return parse_request(self.user_of(tenant, name), self._catalog, self._default)


def unknown(name: str) -> RevisionNotFoundError:
    """The one answer for all that does not exist for who asks."""
    shown = name if len(name) <= 100 else name[:100] + "..."
    return RevisionNotFoundError(f"the model {shown!r} does not exist, or is not yours")


def weighted(part: str) -> tuple[str, float]:
    """ "0.5*user" as (user, 0.5); weight 1 where none is given. Raises ServingError on what is no such term."""
    found = _WEIGHTED.fullmatch(part)
    name, weight = (found[2], float(found[1])) if found else (part, 1.0)
    if not name or not math.isfinite(weight):
        raise ServingError(f"{part!r} is no term of a sum: write user, or 0.5*user")
    return name, weight


def _summed(terms: Sequence[Term]) -> tuple[Term, ...]:
    """The same adapter twice is once, with both weights."""
    weights: dict[str, list[Term]] = {}
    for term in terms:
        weights.setdefault(term.manifest.digest, []).append(term)
    return tuple(Term(same[0].manifest, sum(term.weight for term in same)) for same in weights.values())
