"""The endpoints. OpenAI's: completions, chat, models. popax's own: adapters, health, metrics, the operators' page."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

import popax
from popax.errors import UnavailableError
from popax.evaluation.gate import GateConfig
from popax.serving.http import convert
from popax.serving.http.admin import Adapters
from popax.serving.http.answers import Shape, check, streamed, while_heard, whole_answer
from popax.serving.http.errors import add_handlers, body
from popax.serving.http.keys import EVERYBODY, ApiKeys, Caller
from popax.serving.http.limits import BodyLimits, OpenRequests
from popax.serving.http.models import describe, page
from popax.serving.http.operators import PAGE, overview
from popax.serving.http.schemas import AdapterRequest, ChatRequest, CompletionRequest, RollbackRequest
from popax.serving.http.service import Service

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in (
        (400, "not taken as it is"),
        (401, "no key, or nobody's"),
        (403, "not this key's right"),
        (404, "no such model for this key"),
        (408, "the body did not come in time"),
        (409, "another base, a conflict, or below the gate"),
        (413, "the body is too large"),
        (429, "the queue is full"),
        (503, "starting, draining, or too many open requests"),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """max_body: bytes of a request. body_timeout_s: until all of it has come. open_requests: at once."""

    max_body: int = 4 << 20
    body_timeout_s: float = 30.0
    open_requests: int = 4096


def create_app(
    service: Service, *, keys: ApiKeys | None = None, limits: HttpLimits | None = None, gate: GateConfig | None = None
) -> FastAPI:
    """The ASGI app. keys: None lets everybody in, as an admin of all: for loopback only."""
    limits = limits or HttpLimits()
    # FastAPI's own pages of the API load scripts from elsewhere; /openapi.json is there.
    app = FastAPI(title="popax", version=popax.__version__, responses=_ERRORS, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimits, max_bytes=limits.max_body, timeout_s=limits.body_timeout_s)  # pyright: ignore
    app.add_middleware(OpenRequests, most=limits.open_requests)  # pyright: ignore[reportArgumentType]
    add_handlers(app)
    who = _caller(keys)
    app.include_router(_openai(service, who))
    app.include_router(_adapters(service, who, Adapters(service, gate or GateConfig())))
    app.include_router(_operators(service, who))
    return app


def _caller(keys: ApiKeys | None) -> Callable[..., Caller]:
    def caller(request: Request) -> Caller:
        if keys is None:
            return EVERYBODY
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        found = keys.caller(key.strip()) if scheme.lower() == "bearer" else None
        if found is None:
            raise HTTPException(401, "no API key, or one that is nobody's", {"WWW-Authenticate": "Bearer"})
        return found

    return caller


def _openai(service: Service, who: Callable[..., Caller]) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["openai"])
    depends = Depends(who)

    async def answered(request: Request, asked: convert.Asked, shape: Shape, wanted: CompletionRequest | ChatRequest):
        if service.draining:
            raise UnavailableError("the server is closing: ask another one")
        if not wanted.stream:
            return await while_heard(request, whole_answer(service, asked, shape))
        rest = service.answers(asked.requests)
        first = await anext(rest)
        check(first[1])
        options = wanted.stream_options
        with_usage = options is not None and options.include_usage
        parts = streamed(service, asked, shape, with_usage=with_usage, first=first, rest=rest)
        return StreamingResponse(parts, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    @router.post("/completions")
    async def completions(request: Request, wanted: CompletionRequest, caller: Caller = depends):
        named = await service.find(caller.tenant, wanted.model)
        asked = await service.off_loop(convert.completion, service, caller.tenant, named, wanted)
        shape = Shape(service, chat=False, echo=wanted.echo, logprobs=wanted.logprobs is not None)
        return await answered(request, asked, shape, wanted)

    @router.post("/chat/completions")
    async def chat_completions(request: Request, wanted: ChatRequest, caller: Caller = depends):
        named = await service.find(caller.tenant, wanted.model)
        asked = await service.off_loop(convert.chat, service, caller.tenant, named, wanted)
        shape = Shape(service, chat=True, echo=False, logprobs=wanted.logprobs)
        return await answered(request, asked, shape, wanted)

    @router.get("/models")
    async def models(
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: Annotated[str | None, Query(max_length=200)] = None,
        prefix: Annotated[str, Query(max_length=1000)] = "",
        status: Annotated[str | None, Query(pattern="^(promoted|candidate)$")] = None,
        caller: Caller = depends,
    ):
        return await service.off_loop(page, service, caller.tenant, limit, after, prefix, status)

    @router.get("/models/{name:path}")
    async def model(name: str, caller: Caller = depends):
        return describe(service, await service.find(caller.tenant, name))

    return router


def _adapters(service: Service, who: Callable[..., Caller], adapters: Adapters) -> APIRouter:
    router = APIRouter(prefix="/v1/adapters", tags=["adapters"])

    known = Depends(who)

    def admin(caller: Caller = known) -> Caller:
        if not caller.admin:
            raise HTTPException(403, "this key may not move adapters: ask with an admin's")
        return caller

    depends = Depends(admin)

    @router.post("/prewarm")
    async def prewarm(wanted: AdapterRequest, caller: Caller = depends):
        return await service.off_loop(adapters.prewarm, caller.tenant, wanted.model)

    @router.post("/load")
    async def load(wanted: AdapterRequest, caller: Caller = depends):
        return await service.off_loop(adapters.load, caller.tenant, wanted.model)

    @router.post("/unload")
    async def unload(wanted: AdapterRequest, caller: Caller = depends):
        return await service.off_loop(adapters.unload, caller.tenant, wanted.model)

    @router.post("/promote")
    async def promote(wanted: AdapterRequest, caller: Caller = depends):
        return await service.off_loop(adapters.promote, caller.tenant, wanted.model)

    @router.post("/rollback")
    async def rollback(wanted: RollbackRequest, caller: Caller = depends):
        return await service.off_loop(adapters.rollback, caller.tenant, wanted.model, wanted.revision)

    @router.get("/history/{name:path}")
    async def history(name: str, caller: Caller = depends):
        return await service.off_loop(adapters.history, caller.tenant, name)

    return router


def _operators(service: Service, who: Callable[..., Caller]) -> APIRouter:
    router, depends = APIRouter(tags=["operators"]), Depends(who)

    @router.get("/health")
    async def health():
        alive = service.engine.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @router.get("/ready")
    async def ready():
        if service.draining or not service.engine.alive:
            return JSONResponse(body(503, "draining" if service.draining else "failed"), 503)
        return {"status": "ready"}

    def operator(caller: Caller = depends) -> Caller:
        if caller.tenant:
            raise HTTPException(403, "this names all tenants and their users: it is for an admin of all")
        return caller

    of_all = Depends(operator)

    @router.get("/metrics", dependencies=[of_all])
    async def metrics():
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @router.get("/overview", dependencies=[of_all])
    async def overview_():
        return await service.off_loop(overview, service)

    @router.get("/", include_in_schema=False)
    async def operators_page():
        return HTMLResponse(PAGE)

    return router
