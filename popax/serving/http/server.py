"""The server's life: bind, answer, drain when told to go, end."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from popax.errors import ConfigError
from popax.serving.http.service import Service

BACKLOG = 16_384


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError where the address is taken, or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"{host}:{port} cannot be listened on: {error.strerror}; choose another --port") from error
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener


def serve(
    app: FastAPI, service: Service, listener: socket.socket, *, drain_s: float, say: Callable[[str], None]
) -> bool:
    """Answer until SIGTERM or SIGINT, then drain: nothing new is taken, what runs may end within drain_s. A second
    signal ends at once. Returns whether all answers ended by themselves."""
    return asyncio.run(_serve(app, service, listener, drain_s, say))


async def _serve(app: FastAPI, service: Service, listener: socket.socket, drain_s: float, say) -> bool:
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_keep_alive=60, timeout_graceful_shutdown=5, lifespan="off"
    )
    server = uvicorn.Server(config)
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    # Its own handlers stop at once: ours drain first.
    server.capture_signals = contextlib.nullcontext  # pyright: ignore[reportAttributeAccessIssue]

    def stop() -> None:
        if told.is_set():
            server.force_exit = True
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    await asyncio.wait((running, asyncio.create_task(told.wait())), return_when=asyncio.FIRST_COMPLETED)
    service.draining = True
    say("draining: no new requests are taken")
    drained = await asyncio.to_thread(service.engine.drain, drain_s)
    if not drained:
        say(f"answers still ran after {drain_s} s: they are cut off")
        await asyncio.to_thread(service.engine.close)
    server.should_exit = True
    await running
    return drained
