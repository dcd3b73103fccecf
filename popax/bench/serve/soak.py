"""`popax bench soak`: a real server and real clients for a long time, at a part of what it can answer.

Clients are processes that are killed in the middle of their streams; more users ask than there are slots, or host
memory. What is counted: answers that went wrong for a client who lived, and what the server says of itself.
"""

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import jax
import numpy as np

from popax.bench.serve.config import BenchServeConfig
from popax.bench.serve.population import fill_catalog
from popax.errors import ConfigError, ServingError
from popax.modeling.base import new_base, save_base
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model

READY = re.compile(r"ready: http://\S+:(\d+)")
CLIENTS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchSoakConfig:
    """seconds: of the soak. load: the part of the answers a second that the server gives when it is asked for more than
    it can. kill_every_s: how long a client lives on average until one of them is killed. users, slots, host_bytes,
    prompt, output, zipf, rank: as in BenchServeConfig."""

    seconds: float = 600.0
    load: float = 0.8
    probe_s: float = 40.0
    kill_every_s: float = 5.0
    users: int = 300
    slots: int = 32
    host_bytes: int = 1 << 27
    rank: int = 8
    prompt: tuple[int, int] = (16, 48)
    output: tuple[int, int] = (16, 64)
    zipf: float = 1.1
    seed: int = 0

    def __post_init__(self):
        if not (self.seconds > 0 and 0 < self.load < 1 and self.probe_s > 0 and self.kill_every_s > 0):
            raise ConfigError(f"{self}: times above 0, and load between 0 and 1")


def bench_soak(model: ModelConfig, config: BenchSoakConfig, serve_flags: list[str]) -> dict[str, Any]:
    """All figures; progress goes to stderr. serve_flags: of `popax serve`, for the steps' shapes."""
    with tempfile.TemporaryDirectory(prefix="popax-bench-soak-") as folder:
        place = Path(folder)
        net = Model(model)
        base = new_base(net, net.init(jax.random.key(config.seed)), source="random weights")
        save_base(place / "base", base)
        wanted = BenchServeConfig(users=max(config.users, 200), slots=config.slots, rank=config.rank, cold=0.1)
        fill_catalog(place / "catalog", base, wanted)
        server, port = _server(place, config, serve_flags)
        try:
            _wave(port, config, rate=1000.0, seconds=config.probe_s / 2, kills=False)
            full, _ = _wave(port, config, rate=1000.0, seconds=config.probe_s, kills=False)
            capacity = len([one for one in full if not one["wrong"]]) / config.probe_s
            _say(f"{capacity:.2f} answers/s at most; now {config.load:.0%} of it for {config.seconds:.0f} s")
            found, killed = _wave(port, config, rate=config.load * capacity, seconds=config.seconds, kills=True)
            overview = _overview(port)
        finally:
            server.terminate()
            code = server.wait(120)
    return _figures(found, killed, capacity, overview, code)


def _figures(found: list[dict], killed: int, capacity: float, overview: dict, code: int) -> dict[str, Any]:
    wrong = [one["wrong"] for one in found if one["wrong"]]
    for text in sorted(set(wrong)):
        _say(f"wrong: {text}")
    figures: dict[str, Any] = {
        "capacity_answers_per_s": capacity,
        "answers": len(found),
        "errors": len(wrong),
        "clients_killed": killed,
        "answers_cancelled": overview["totals"]["ended"].get("cancelled", 0),
        "answers_in_error": overview["totals"]["ended"].get("error", 0),
        "evictions": sum(cohort["device"]["evictions"] for cohort in overview["cohorts"]),
        "catalog_loads": sum(cohort["catalog"]["loads"] for cohort in overview["cohorts"]),
        "pages_left": overview["pages"]["held"],
        "exit_code": code,
    }
    for name in ("first_s", "whole_s"):
        values = [one[name] for one in found if not one["wrong"]]
        figures |= {f"{name[:-2]}_p{at}_s": float(np.percentile(values, at)) for at in (50, 95, 99)}
    return figures


def _server(place: Path, config: BenchSoakConfig, flags: list[str]) -> tuple[subprocess.Popen, int]:
    command = [sys.executable, "-m", "popax.cli.main", "serve", "--base", str(place / "base"), "--port", "0"]
    command += ["--catalog", str(place / "catalog"), "--tokenizer", "byte", "--revision", "latest", *flags]
    for name in ("slots", "host_bytes"):
        command += ["--gin_param", f"ServeConfig.{name}={getattr(config, name)}"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    lines = []
    for line in server.stderr:
        lines.append(line)
        if found := READY.match(line):
            threading.Thread(target=lambda: [None for _ in server.stderr or ()], daemon=True).start()
            return server, int(found[1])
    raise ServingError(f"the server did not start: {' '.join(lines[-3:])}")


def _wave(port: int, config: BenchSoakConfig, *, rate: float, seconds: float, kills: bool) -> tuple[list[dict], int]:
    """(what clients heard in so many seconds, how many were killed)."""
    chance, heard, killed, started = random.Random(config.seed), [], 0, 0

    def client() -> subprocess.Popen:
        nonlocal started
        started += 1
        sizes = [*config.prompt, *config.output]
        arguments = [port, rate / CLIENTS, config.users, config.zipf, *sizes, config.seed * 1000 + started]
        module = [sys.executable, "-m", "popax.bench.serve.soak_client"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        child = subprocess.Popen([*module, *map(str, arguments)], stdout=subprocess.PIPE, text=True, env=environment)

        def listen() -> None:
            for line in child.stdout or ():
                if line.endswith("\n"):
                    heard.append(json.loads(line))

        threading.Thread(target=listen, daemon=True).start()
        return child

    clients, end = [client() for _ in range(CLIENTS)], time.monotonic() + seconds
    said = time.monotonic()
    try:
        while time.monotonic() < end:
            time.sleep(
                min(chance.expovariate(1 / config.kill_every_s) if kills else 1.0, max(0, end - time.monotonic()))
            )
            if kills and time.monotonic() < end:
                at = chance.randrange(CLIENTS)
                clients[at].kill()
                clients[at].wait()
                clients[at], killed = client(), killed + 1
            if time.monotonic() - said > 30:
                said = time.monotonic()
                _say(f"{end - said:.0f} s left: {len(heard)} answers, {sum(bool(one['wrong']) for one in heard)} wrong")
    finally:
        before = list(heard)  # what is cut off now is nobody's error
        for each in clients:
            each.kill()
            each.wait()
    _idle(port)
    return before, killed


def _idle(port: int) -> None:
    """Wait until the server has nothing left of clients who are gone."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        overview = _overview(port)
        if not overview["running"] and not overview["waiting"]:
            return
        time.sleep(0.2)


def _overview(port: int) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/overview", timeout=60) as answer:
        return json.load(answer)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
