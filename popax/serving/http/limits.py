"""What a client may not do to the server: bodies without end, bodies that never come, too many requests at once."""

import asyncio

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from popax.serving.http.errors import RETRY_AFTER_S, body


class TooLarge(Exception):
    """The body is over the limit."""


class BodyLimits:
    """An ASGI middleware: 413 for a body of more than so many bytes, 408 for one that takes longer than so long.

    The whole body is read before the app sees it, so that nothing of a request that is refused has happened.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float):
        self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        try:
            whole = await asyncio.wait_for(self._read(scope, receive), self._timeout_s)
        except TooLarge:
            message = f"the body is over {self._max_bytes:,} bytes: send less"
            await JSONResponse(body(413, message), 413, {"Connection": "close"})(scope, receive, send)
            return
        except TimeoutError:
            message = f"the body did not come in {self._timeout_s} s"
            await JSONResponse(body(408, message), 408, {"Connection": "close"})(scope, receive, send)
            return
        if whole is None:
            return  # the client went away
        told = False

        async def replay() -> Message:
            nonlocal told
            if told:
                return await receive()  # the end of the connection
            told = True
            return {"type": "http.request", "body": whole, "more_body": False}

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            raise TooLarge
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_bytes:
                raise TooLarge
            if not message.get("more_body"):
                return b"".join(parts)


class OpenRequests:
    """An ASGI middleware: 503 beyond so many requests at once, before anything of theirs is read. Counts those open."""

    def __init__(self, app: ASGIApp, *, most: int):
        self._app, self._most, self.count = app, most, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self.count >= self._most and scope["path"] not in ("/health", "/metrics"):
            content = body(503, f"{self.count} requests are open: ask again later", "unavailable")
            await JSONResponse(content, 503, {"Retry-After": str(RETRY_AFTER_S)})(scope, receive, send)
            return
        self.count += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.count -= 1
