"""A real server on a real port, in threads of the test's own process."""

import contextlib
import json
import threading
import time

import httpx2
import uvicorn

from popax.serving.http.app import HttpLimits, create_app
from popax.serving.http.keys import ApiKeys, Caller, digest_of
from popax.serving.http.server import bind
from popax.serving.http.service import Service

KEYS = {"acme": "key-of-acme", "zeta": "key-of-zeta", "boss": "key-of-acmes-admin", "all": "key-of-everybody"}
CALLERS = {"acme": Caller("acme"), "zeta": Caller("zeta"), "boss": Caller("acme", True), "all": Caller("", True)}


class Server:
    """url, the service behind it, and clients with or without a key."""

    def __init__(self, engine, catalog, tokenizer, *, open_to_all=False, limits=None):
        self.service = Service(engine, tokenizer, catalog, name="tiny")
        keys = None if open_to_all else ApiKeys({digest_of(KEYS[name]): CALLERS[name] for name in KEYS})
        self.app = create_app(self.service, keys=keys, limits=limits or HttpLimits())
        listener = bind("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(uvicorn.Config(self.app, log_level="warning", lifespan="off"))
        self._server.capture_signals = contextlib.nullcontext
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def client(self, key=None):
        headers = {"Authorization": f"Bearer {KEYS[key]}"} if key else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60.0)

    def close(self):
        self._server.should_exit = True
        self._thread.join()
        self.service.close()


def events(response):
    """The JSON of each server-sent event, up to [DONE]."""
    found = []
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            found.append(json.loads(line.removeprefix("data: ")))
    return found
