"""popax's named errors as OpenAI's clients know them: {"error": {message, type, param, code}} and a status."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from popax.errors import (
    BaseMismatchError,
    CatalogError,
    ConfigError,
    ConflictError,
    CorruptRevisionError,
    GateError,
    PopaxError,
    QueueFullError,
    RevisionNotFoundError,
    ServingError,
    StorageError,
    TokenizerError,
    UnavailableError,
)

RETRY_AFTER_S = 1
# The first that an error is an instance of.
STATUS: tuple[tuple[type[BaseException], int, str], ...] = (
    (QueueFullError, 429, "rate_limit_exceeded"),
    (UnavailableError, 503, "unavailable"),
    (RevisionNotFoundError, 404, "model_not_found"),
    (BaseMismatchError, 409, "base_mismatch"),
    (ConflictError, 409, "conflict"),
    (GateError, 409, "gate"),
    (CorruptRevisionError, 500, "corrupt_revision"),
    (StorageError, 503, "storage"),
    (CatalogError, 500, "catalog"),
    (ServingError, 400, "invalid_request"),
    (ConfigError, 400, "invalid_request"),
    (TokenizerError, 400, "invalid_request"),
    (PopaxError, 500, "internal"),
)
TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
TYPES |= {409: "conflict_error", 413: "invalid_request_error", 408: "invalid_request_error", 429: "rate_limit_error"}


def body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    return {"error": {"message": message, "type": TYPES.get(status, "server_error"), "param": param, "code": code}}


def described(error: BaseException) -> tuple[int, dict[str, Any]]:
    """(status, body) of an error. What is no named error says nothing of itself to a caller."""
    for kind, status, code in STATUS:
        if isinstance(error, kind):
            return status, body(status, " ".join(str(error).split()), code)
    return 500, body(500, "an error inside the server; its log says more", "internal")


def add_handlers(app: FastAPI) -> None:
    """All errors of the app leave it in OpenAI's shape."""

    async def named(request: Request, error: Exception) -> JSONResponse:
        del request
        status, content = described(error)
        headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else None
        return JSONResponse(content, status, headers)

    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        del request
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        message = f"{where}: {first['msg']}" if where else first["msg"]
        return JSONResponse(body(400, message, "invalid_request", where or None), 400)

    async def http(request: Request, error: HTTPException) -> JSONResponse:
        del request
        return JSONResponse(body(error.status_code, str(error.detail)), error.status_code, error.headers)

    for kind in (PopaxError, Exception):
        app.add_exception_handler(kind, named)
    app.add_exception_handler(RequestValidationError, invalid)  # pyright: ignore[reportArgumentType]
    app.add_exception_handler(HTTPException, http)  # pyright: ignore[reportArgumentType]
