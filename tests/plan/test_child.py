"""The compiling process: what cannot be handed over, and what happens when it dies."""

import sys

import optax
import pytest

from popax.errors import PlanError
from popax.plan import child
from popax.plan.config import MeshShape, PlanConfig

CONFIG = PlanConfig(topology="v5e:2x2", mesh=MeshShape(fsdp=4))


def test_an_optimizer_without_a_name_cannot_be_handed_over():
    config = PlanConfig(topology="v5e:2x2", mesh=MeshShape(fsdp=4), optimizer=lambda own: optax.sgd(own.learning_rate))
    with pytest.raises(PlanError, match="use named functions"):
        child.compile_apart(config, None, "train")


def test_a_process_that_dies_is_named(monkeypatch, tmp_path):
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho no memory left >&2\nexit 9\n")
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))
    with pytest.raises(PlanError, match=r"ended with 9 in the train step: no memory left"):
        child.compile_apart(CONFIG, None, "train")


def test_a_process_that_lives_is_heard_of(monkeypatch, tmp_path):
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nsleep 1\nexit 1\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    monkeypatch.setattr(child, "HEARTBEAT_S", 0.2)
    said = []
    with pytest.raises(PlanError):
        child.compile_apart(CONFIG, None, "decode", said.append)
    assert said
    assert all(line.startswith("decode: compiling, ") for line in said)
