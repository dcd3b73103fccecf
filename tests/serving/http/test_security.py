"""What strangers send: nobody's keys, other tenants' names, bodies of every kind. Never a 5xx, never another's byte."""

import json
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from popax.serving.http.app import HttpLimits
from tests.serving.http.server import Server

BODY = {"model": "user-1", "prompt": "a", "max_tokens": 1, "temperature": 0}
ROUTES = [
    ("POST", "/v1/completions", BODY),
    (
        "POST",
        "/v1/chat/completions",
        {"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    ),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/user-1", None),
    ("POST", "/v1/adapters/promote", {"model": "user-1"}),
    ("GET", "/v1/adapters/history/user-1", None),
    ("GET", "/overview", None),
]


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic key-of-acme", "key-of-acme", "Bearer \xff"])
def test_without_a_key_there_is_nothing(server, method, path, body, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    with httpx2.Client(base_url=server.url, headers=headers, timeout=30) as client:
        found = client.request(method, path, json=body) if body else client.request(method, path)
    assert found.status_code == 401
    assert found.headers["www-authenticate"] == "Bearer"


def test_health_needs_none_and_says_little(server):
    with server.client() as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ready").json() == {"status": "ready"}
    for key, status in ((None, 401), ("acme", 403), ("boss", 403), ("all", 200)):
        with server.client(key) as client:
            found = client.get("/metrics")
            assert found.status_code == status
            assert (b"popax_steps_total" in found.content) == (status == 200)
            assert (b"acme" in found.content) <= (status == 200)


def test_another_tenants_user_does_not_exist(server):
    """The same answer, and the same time, as for somebody who is nobody."""
    with server.client("acme") as client:

        def asked(name):
            began = time.perf_counter()
            found = client.post("/v1/completions", json=BODY | {"model": name})
            return found, time.perf_counter() - began

        names = ["user-2", "zeta/user-2", "../zeta/user-2", "acme/../zeta/user-2", "%2e%2e/zeta/user-2", "user-1\0"]
        nobody, _ = asked("nobody")
        for name in names:
            found, _ = asked(name)
            assert found.status_code == 404
            message = found.json()["error"]["message"]
            assert message.replace(repr(name), "") == nobody.json()["error"]["message"].replace(repr("nobody"), "")
            assert client.get(f"/v1/models/{name.encode().hex()}").status_code == 404
        times = {name: statistics.median(asked(name)[1] for _ in range(30)) for name in ("user-2", "nobody")}
        assert times["user-2"] < 5 * times["nobody"]
        assert times["nobody"] < 5 * times["user-2"]


def test_rights_are_the_keys(server):
    with server.client("acme") as client:
        assert client.post("/v1/adapters/promote", json={"model": "user-1"}).status_code == 403
        assert client.get("/overview").status_code == 403
    with server.client("boss") as client:
        assert client.get("/v1/adapters/history/user-1").json()["latest"] == 1
        assert client.get("/v1/adapters/history/user-2").status_code == 404
        assert client.post("/v1/adapters/promote", json={"model": "user-2"}).status_code == 404
        unscored = client.post("/v1/adapters/promote", json={"model": "user-1@1"})
        assert unscored.status_code == 409
        assert "scored" in unscored.json()["error"]["message"]
        assert client.get("/overview").status_code == 403
    with server.client("all") as client:
        assert client.get("/overview").json()["running"] == 0
        assert client.get("/v1/models/zeta/user-2").json()["id"] == "zeta/user-2"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.text(min_size=1, max_size=200)
    | st.sampled_from(["../x", "a\0b", "x" * 4000, "\uff35\uff33\uff25\uff32-1", "User-1", "."])
)
def test_no_name_is_a_path_or_another_user(server, name):
    with server.client("acme") as client:
        found = client.post("/v1/completions", json=BODY | {"model": name})
    known = name == "base" or name.startswith("user-1")
    assert found.status_code in ({200, 400, 404} if known else {400, 404}), (name, found.text)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"model": "user-1", "prompt": "a", "temperature": NaN}',
        b'{"model": "user-1", "prompt": "a", "temperature": 1e999}',
        b'{"model": "user-1", "prompt": "a", "max_tokens": 1e3}',
        b'{"model": "user-1", "prompt": "a", "max_tokens": -1}',
        b'{"model": "user-1", "prompt": "a", "n": 1000000}',
        b'{"model": "user-1", "prompt": "a", "seed": 99999999999999999999999}',
        b'{"model": "user-1", "prompt": "\\ud800"}',
        b'{"model": "\\ud800", "prompt": "a"}',
        b'{"model": "user-1", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        json.dumps({"model": "user-1", "prompt": ["a"] * 1000}).encode(),
    ],
)
def test_bodies_of_every_kind(server, body):
    with server.client("acme") as client:
        found = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert found.status_code in (400, 404, 422), found.text
    assert "error" in found.json()


def test_a_giant_and_a_slow_body(world, engine, chatty):
    server = Server(
        engine, world.catalog, chatty, limits=HttpLimits(max_body=10_000, body_timeout_s=0.5, open_requests=8)
    )
    try:
        with server.client("acme") as client:
            assert client.post("/v1/completions", json=BODY | {"prompt": "x" * 20_000}).status_code == 413

            def endless():
                for _ in range(1000):
                    yield b" " * 1000

            assert client.post("/v1/completions", content=endless()).status_code == 413
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            slow.settimeout(10)
            assert slow.recv(100).startswith(b"HTTP/1.1 408")
        hanging = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(8)]
        for each in hanging:
            each.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        time.sleep(0.1)
        with server.client("acme") as client:
            found = client.post("/v1/completions", json=BODY)
            assert found.status_code == 503
            assert found.headers["retry-after"] == "1"
            assert client.get("/health").status_code == 200
            time.sleep(0.6)
            assert client.post("/v1/completions", json=BODY).status_code == 200
        for each in hanging:
            each.close()
    finally:
        server.close()


def test_a_client_who_leaves_frees_its_row(engine, server):
    """A stream that is closed half-way: cancelled in the engine, with its pages."""
    body = BODY | {"max_tokens": 100, "stream": True}
    with server.client("acme") as client, client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    before = engine.state().counters.ended.get("cancelled", 0)
    assert engine.wait_idle(30.0)
    state = engine.state()
    assert (state.running, state.pages_held) == (0, 0)
    assert state.counters.ended["cancelled"] >= max(1, before)


IDLE = 10_000
IDLERS = f"""
import socket, sys
held = [socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=60) for _ in range({IDLE})]
print(len(held), flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_ten_thousand_idle_connections_disturb_nobody(server):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < IDLE + 1000:
        pytest.skip(f"the limit on open files is {hard}: {IDLE} connections need more")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Their own ends are another process's files.
    child = subprocess.Popen(
        [sys.executable, "-c", IDLERS, str(server.port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline().strip() == str(IDLE)
        with server.client("acme") as client:
            assert client.post("/v1/completions", json=BODY).status_code == 200
    finally:
        child.communicate("")


@pytest.mark.slow
def test_whatever_the_openapi_page_allows(open_server):
    """schemathesis: generated requests for every operation. No 5xx."""
    import schemathesis

    schema = schemathesis.openapi.from_asgi("/openapi.json", open_server.app)
    for result in schema.get_all_operations():
        operation = result.ok()
        strategy = operation.as_strategy()

        @settings(max_examples=25, suppress_health_check=list(HealthCheck))
        @given(case=strategy)
        def probe(case):
            if isinstance(case.body, dict):
                case.body.pop("max_tokens", None)
            response = case.call(base_url=open_server.url)
            assert response.status_code < 500, response.text

        probe()


def test_who_does_not_wait_for_a_whole_answer_costs_no_more_of_it(engine, server):
    body = json.dumps(BODY | {"max_tokens": 110, "n": 8}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key-of-acme\r\nContent-Type: "
    head += b"application/json\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n"
    gate = threading.Event()
    engine.call(gate.wait)
    before = engine.state().counters.requests
    with socket.create_connection(("127.0.0.1", server.port)) as impatient:
        impatient.sendall(head + body)
        while engine.state().counters.requests < before + 8:
            time.sleep(0.01)
    time.sleep(1.0)  # the server has seen that they went
    cancelled = engine.state().counters.ended.get("cancelled", 0)
    gate.set()
    assert engine.wait_idle(30.0)
    assert engine.state().counters.ended["cancelled"] == cancelled + 8


def test_adapters_are_prewarmed_pinned_and_let_go(engine, server, world):
    with server.client("boss") as client:
        assert client.post("/v1/adapters/prewarm", json={"model": "user-9"}).json()["state"] == "warm"
        loaded = client.post("/v1/adapters/load", json={"model": "user-9"}).json()
        assert loaded["revisions"][0]["user"] == "acme/user-9"
        held = [one for each in engine.rooms.residencies.values() for one in each.occupants() if one and one["held"]]
        assert [one["user"] for one in held] == ["acme/user-9"]
        assert client.post("/v1/adapters/unload", json={"model": "user-9"}).json()["state"] == "unloaded"
        assert client.post("/v1/adapters/unload", json={"model": "user-9"}).status_code == 400
        assert client.post("/v1/adapters/load", json={"model": "base"}).status_code == 400
        assert client.post("/v1/adapters/load", json={"model": "user-2"}).status_code == 404
    assert not [one for each in engine.rooms.residencies.values() for one in each.occupants() if one and one["held"]]
