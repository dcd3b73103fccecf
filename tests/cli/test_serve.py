"""`popax serve` as a process of its own: it answers, drains on SIGTERM, and SIGKILL costs the catalog nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import httpx2
import numpy as np
import pytest

from popax.modeling.base import save_base
from popax.store import Catalog
from tests.serving.world import COHORTS, World

SHAPES = ["--gin_param", "EngineShapes.rows=(4,)", "--gin_param", "EngineShapes.contexts=()"]
SHAPES += ["--gin_param", "EngineShapes.context=128", "--gin_param", "EngineShapes.groups=2"]


class Process:
    """`popax serve` on a free port."""

    def __init__(self, world, folder, *more):
        command = [sys.executable, "-m", "popax.cli.main", "serve", "--base", str(folder / "base"), "--port", "0"]
        command += ["--tokenizer", "byte", "--catalog", str(folder / "catalog"), *SHAPES, *more]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines = []
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.match(r"ready: (http://\S+)", line):
                self.url = found[1]
                break
        else:
            raise AssertionError("".join(self.lines))
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True).start()

    def ask(self, **body):
        return httpx2.post(f"{self.url}/v1/completions", json={"temperature": 0, **body}, timeout=60)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A saved base, and a catalog of three users."""
    folder = tmp_path_factory.mktemp("serve")
    world = World.make(folder / "catalog", users=3, cohorts=COHORTS[1:2])
    save_base(folder / "base", world.base)
    return world, folder


@pytest.mark.slow
def test_it_answers_drains_and_ends(small):
    world, folder = small
    process = Process(world, folder)
    prompt = list(b"hello")
    made = process.ask(model=world.users[0], prompt=prompt, max_tokens=6).json()
    assert made["choices"][0]["text"] == world.tokenizer.decode(world.alone(prompt, 6, world.users[0]))
    found = []

    def long():
        found.append(process.ask(model=world.users[1], prompt=prompt, max_tokens=110))

    thread = threading.Thread(target=long)
    with httpx2.stream(
        "POST",
        f"{process.url}/v1/completions",
        json={"model": "base", "prompt": "x", "stream": True, "max_tokens": 100},
        timeout=60,
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        thread.start()
        process.process.send_signal(signal.SIGTERM)
        rest = list(lines)
    thread.join()
    assert rest[-1] == "" or rest[-1] == "data: [DONE]"
    assert found[0].status_code in (200, 503)  # taken before the signal, or refused after it
    assert process.process.wait(60) == 0
    assert any("draining" in line for line in process.lines)


@pytest.mark.slow
def test_killed_while_pointers_move_the_catalog_is_whole(small):
    world, folder = small
    user = world.users[2]
    world.commit(user, COHORTS[1], np.random.default_rng(5))
    process = Process(world, folder)
    stop = threading.Event()

    def roll():
        while not stop.is_set():
            try:
                httpx2.post(f"{process.url}/v1/adapters/rollback", json={"model": user}, timeout=5)
                process.ask(model=user, prompt="a", max_tokens=30)
            except httpx2.HTTPError:
                return

    threads = [threading.Thread(target=roll) for _ in range(3)]
    for thread in threads:
        thread.start()
    process.ask(model=user, prompt="a", max_tokens=20)
    process.process.kill()
    process.process.wait()
    stop.set()
    for thread in threads:
        thread.join()
    audit = Catalog.open(folder / "catalog").verify()
    assert audit.clean
    assert world.catalog.load(user)[1].revision == 2


def test_other_machines_need_keys(small, capsys):
    from popax.cli.main import main

    _, folder = small
    assert main(["serve", "--base", str(folder / "base"), "--host", "0.0.0.0"]) == 2
    assert "api-key" in capsys.readouterr().err
    keys = folder / "keys.json"
    assert main(["api-key", str(keys), "--tenant", "acme"]) == 0
    made = capsys.readouterr().out.strip()
    assert made not in keys.read_text()
    assert list(json.loads(keys.read_text()).values()) == [{"tenant": "acme", "admin": False}]
    assert keys.stat().st_mode & 0o077 == 0
    assert main(["api-key", str(keys)]) == 2
    assert main(["api-key", str(keys), "--tenant", "a/b"]) == 2
    assert "tenant" in capsys.readouterr().err
