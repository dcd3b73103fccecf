"""/v1/models: the base, and the users that a caller may name, a page at a time."""

import calendar
import time
from typing import Any

from popax.errors import ServingError
from popax.serving.http.service import Service
from popax.serving.names import Named
from popax.serving.pool import BASE_ONLY
from popax.store.filters import UserFilter
from popax.store.manifest import Manifest

SCAN = 20_000  # records that one page reads at most


def page(
    service: Service, tenant: str, limit: int, after: str | None, prefix: str, status: str | None
) -> dict[str, Any]:
    """Up to `limit` models; `last_id` goes into the next call's `after` while `has_more`. Users come in the order of
    their ids' hashes. A page may be short, or empty, where few of many users are meant: `has_more` says it goes on."""
    found = [] if after is not None or prefix or status else [_base(service)]
    if service.catalog is None:
        return _page(found, None)
    mine = f"{tenant}/" if tenant else ""
    where = UserFilter(
        prefix=mine + prefix,
        base=service.engine.base.digest,
        status=status,  # pyright: ignore[reportArgumentType]
    )
    try:
        users, cursor = service.catalog.page(where, limit=limit - len(found), after=after, scan=SCAN)
    except ValueError as error:
        raise ServingError(f"after={after!r} is no place to go on from: give last_id of a page") from error
    found += [
        _user(record.user.removeprefix(mine), manifest) | {"promoted": record.promoted, "latest": record.latest}
        for record, manifest in users
    ]
    return _page(found, cursor)


def describe(service: Service, named: Named) -> dict[str, Any]:
    """One model, by any name that a request may use."""
    if not named.terms:
        return _base(service)
    if len(named.terms) == 1 and named.terms[0].weight == 1.0:
        return _user(named.name, named.terms[0].manifest)
    terms = [
        {"user": term.manifest.user, "revision": term.manifest.revision, "weight": term.weight} for term in named.terms
    ]
    return _user(named.name, named.terms[0].manifest) | {"sum": terms}


def _page(found: list[dict[str, Any]], cursor: str | None) -> dict[str, Any]:
    return {"object": "list", "data": found, "has_more": cursor is not None, "last_id": cursor}


def _base(service: Service) -> dict[str, Any]:
    return {
        "id": BASE_ONLY,
        "object": "model",
        "created": 0,
        "owned_by": service.name,
        "root": service.engine.base.digest,
    }


def _user(name: str, manifest: Manifest) -> dict[str, Any]:
    created = calendar.timegm(time.strptime(manifest.created[:19], "%Y-%m-%dT%H:%M:%S"))
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": manifest.user.partition("/")[0] if "/" in manifest.user else "popax",
        "root": manifest.digest,
        "parent": BASE_ONLY,
        "revision": manifest.revision,
        "method": manifest.config["method"],
        "rank": manifest.config["rank"],
    }
