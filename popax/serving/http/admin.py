"""What an operator, or a tenant's own admin, does with adapters while the server runs."""

from collections.abc import Callable
from typing import Any

from popax.errors import ServingError
from popax.evaluation.gate import GateConfig
from popax.evaluation.promotion import promote
from popax.serving.detokenize import TextStream
from popax.serving.http.service import Service
from popax.serving.request import Answer, GenerationRequest, Term
from popax.store.manifest import Manifest, UserRecord


class Adapters:
    """Load, unload, pin, promote, roll back. Blocks on storage: call it off the loop."""

    def __init__(self, service: Service, gate: GateConfig):
        self._service, self._gate = service, gate
        self._pinned: dict[str, Answer] = {}

    def prewarm(self, tenant: str, name: str) -> dict[str, Any]:
        """Bring a revision into the host's memory; the next request finds it there."""
        terms = self._terms(tenant, name)
        rooms = self._service.engine.rooms
        assert rooms is not None
        rooms.check(terms)
        for row in rooms.fetch(terms):
            if hasattr(row, "result"):
                row.result()
        return {"model": name, "state": "warm", "revisions": [_shown(term.manifest) for term in terms]}

    def load(self, tenant: str, name: str) -> dict[str, Any]:
        """Into a device slot, and kept there until `unload`: pinned. Raises ServingError where no slot is free."""
        terms = self._terms(tenant, name)
        key = f"{tenant}\0{name}"
        held = Answer(
            GenerationRequest(tokens=(0,), terms=terms), lambda event: None, TextStream(lambda tokens: ""), b""
        )
        rooms = self._service.engine.rooms
        assert rooms is not None
        rooms.check(terms)
        held.loading = [row if not hasattr(row, "result") else row.result() for row in rooms.fetch(terms)]

        def pin() -> None:
            if key in self._pinned:
                rooms.release(self._pinned.pop(key))
            # A request needs slots that are nobody's for ever.
            pins = [term.manifest.cohort for one in self._pinned.values() for term in one.request.terms]
            most = rooms.slots - rooms.terms
            if any(pins.count(term.manifest.cohort) >= most for term in terms):
                raise ServingError(f"{most} of {rooms.slots} slots may be pinned, and are: unload another adapter")
            if not rooms.hold(held):
                raise ServingError(f"no slot is free for {name!r}: unload another adapter, or start with more slots")
            self._pinned[key] = held

        self._between_steps(pin)
        return {"model": name, "state": "loaded", "revisions": [_shown(term.manifest) for term in terms]}

    def unload(self, tenant: str, name: str) -> dict[str, Any]:
        """The inverse of `load`: the slot may be given to another one. Nothing is deleted."""
        rooms = self._service.engine.rooms

        def unpin() -> None:
            held = self._pinned.pop(f"{tenant}\0{name}", None)
            if held is None:
                raise ServingError(f"{name!r} is not loaded by this call: only what was loaded is unloaded")
            assert rooms is not None
            rooms.release(held)

        self._between_steps(unpin)
        return {"model": name, "state": "unloaded"}

    def promote(self, tenant: str, name: str) -> dict[str, Any]:
        """Serving follows this revision from the next request on, which finds its row in the host's memory: it is read
        before the pointer moves. Raises GateError where its scores do not pass."""
        manifest = self._one(tenant, name)
        self.prewarm(tenant, name)
        catalog = self._service.catalog
        assert catalog is not None
        return _pointers(tenant, promote(catalog, manifest.user, manifest.revision, self._gate))

    def rollback(self, tenant: str, name: str, revision: int | None) -> dict[str, Any]:
        """Serving follows an earlier promotion again."""
        manifest = self._one(tenant, name)
        catalog = self._service.catalog
        assert catalog is not None
        return _pointers(tenant, catalog.rollback(manifest.user, revision))

    def history(self, tenant: str, name: str) -> dict[str, Any]:
        """All revisions of a user, the newest first."""
        manifest = self._one(tenant, f"{name}@latest" if "@" not in name else name)
        catalog = self._service.catalog
        assert catalog is not None
        [record] = catalog.records([manifest.user])
        assert record is not None
        revisions = [
            {
                "revision": one.revision,
                "created": one.created,
                "digest": one.digest,
                "method": one.config["method"],
                "rank": one.config["rank"],
                "metrics": dict(one.metrics),
                "parent": one.parent,
            }
            for one in reversed(catalog.history(manifest.user))
        ]
        return _pointers(tenant, record) | {"revisions": revisions}

    def _terms(self, tenant: str, name: str) -> tuple[Term, ...]:
        terms = self._service.names.find(tenant, name).terms
        if not terms:
            raise ServingError(f"{name!r} is the base, which is always there: name a user")
        return terms

    def _one(self, tenant: str, name: str) -> Manifest:
        terms = self._terms(tenant, name)
        if len(terms) != 1 or terms[0].weight != 1.0:
            raise ServingError(f"{name!r} is a sum: name one user")
        return terms[0].manifest

    def _between_steps(self, work: Callable[[], None]) -> None:
        self._service.engine.wait_for(work)


def _shown(manifest: Manifest) -> dict[str, Any]:
    return {"user": manifest.user, "revision": manifest.revision, "digest": manifest.digest}


def _pointers(tenant: str, record: UserRecord) -> dict[str, Any]:
    name = record.user.removeprefix(f"{tenant}/") if tenant else record.user
    return {"model": name, "latest": record.latest, "promoted": record.promoted, "promotions": list(record.promotions)}
