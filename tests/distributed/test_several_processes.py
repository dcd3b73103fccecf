"""Two processes of four devices do what one device does; a lost one is named, and a stopped run goes on exactly."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from popax.cli.main import main
from popax.distributed.group import ProcessGroup
from popax.errors import ProcessError
from popax.store.catalog import Catalog
from popax.store.checkpoint import CheckpointStore
from popax.store.extract import extract_user
from popax.training.metrics import read_metrics

TOLERANCE = 1e-5
pytestmark = pytest.mark.slow


def assert_equal_runs(found: Path, expected: Path) -> None:
    """The same users with the same revisions, the same rounds with the same losses."""
    mine, other = (Catalog.open(run / "catalog", read_only=True) for run in (found, expected))
    users = [record.user for record in other.list()]
    assert len(users) == 24
    assert [(record.user, record.latest) for record in mine.list()] == [(user, 1) for user in users]
    for user in users:
        (adapter, manifest), (wanted, original) = mine.load(user), other.load(user)
        assert manifest.metrics["kept_step"] == original.metrics["kept_step"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=TOLERANCE), adapter, wanted)
    rounds, straight = read_metrics(found), read_metrics(expected)
    assert [one["step"] for one in rounds] == [one["step"] for one in straight]
    np.testing.assert_allclose(
        [one["loss"] for one in rounds], [one["loss"] for one in straight], atol=TOLERANCE, rtol=TOLERANCE
    )


def digests(run: Path) -> dict[str, list[str]]:
    catalog = Catalog.open(run / "catalog", read_only=True)
    return {record.user: [manifest.digest for manifest in catalog.history(record.user)] for record in catalog.list()}


@pytest.fixture(scope="module")
def together(world) -> Path:
    """Two processes of four devices, never stopped."""
    out = world.folder / "together"
    output = world.run(*world.train(out))
    assert output.count("24 users trained") == 1, "process 0 alone reports"
    return out


@pytest.fixture(scope="module")
def eight(world) -> Path:
    """One process of eight devices."""
    out = world.folder / "eight"
    assert main(world.train(out, "--mesh", "population=8")) == 0
    return out


def test_one_process_with_eight_devices_equals_one_device(eight, straight):
    assert_equal_runs(eight, straight)


def test_two_processes_equal_one_device_and_each_writes_its_own_shard(together, eight, straight):
    assert_equal_runs(together, straight)
    assert digests(together) == digests(eight), "the same mesh, the same bytes"
    catalog = Catalog.open(together / "catalog", read_only=True)
    shards = [catalog.history(record.user)[-1].shard for record in catalog.list()]
    assert set(shards) == {0, 1}
    assert json.loads((together / "catalog" / "popax_catalog.json").read_text())["shards"] == 2


def test_extraction_reads_what_two_processes_wrote(together, straight):
    for user in ("u00", "u13"):
        mine, other = (extract_user(run / "catalog", user) for run in (together, straight))
        assert mine.config == other.config
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=TOLERANCE), mine.adapter, other.adapter)


def test_invariant_5_two_processes_generate_what_one_device_does(world, together):
    rows = ["u00", "base", "u07", "u13", "u21", "u03", "base", "u10"]
    command = ["generate", "--base", str(world.base), "--catalog", str(together / "catalog"), "--prompt", "ab"]
    command += [part for row in rows for part in ("--user", row)] + ["--max_new_tokens", "8", "--revision", "latest"]
    many, one = world.folder / "many.json", world.folder / "one.json"
    world.run(*command, "--json", str(many), "--mesh", "population=4,fsdp=2")
    assert main([*command, "--json", str(one)]) == 0
    assert json.loads(many.read_text()) == json.loads(one.read_text())
    assert len({tuple(row["tokens"]) for row in json.loads(one.read_text())}) > 1, "everybody writes the same"


def test_a_notice_to_one_process_stops_all_and_the_run_goes_on_with_fewer_devices(world, straight):
    """8 -> 4 -> 2 devices: each checkpoint is restored onto another mesh, by another number of processes.

    On the second mesh every member lies in both processes, a half in each.
    """
    out = world.folder / "elastic"
    for rounds, devices, mesh in ((2, 4, "population=4,fsdp=2"), (6, 2, "fsdp=2,population=2")):
        with world.launched(*world.train(out, "--mesh", mesh), devices=devices) as launched:
            world.wait_for_rounds(out, rounds, launched)
            os.kill(world.workers(launched)[1], signal.SIGTERM)
            errors = launched.communicate(timeout=60)[1]
        assert launched.returncode == 143, errors
        assert errors.count("preempted: ") == 2
        assert errors.count("the same command continues") == 2
        step = read_metrics(out)[-1]["step"]
        assert f"(iteration {step})" in errors
        with contextlib.closing(CheckpointStore(out / "checkpoints", read_only=True)) as kept:
            assert kept.latest() == step
            seated = next(user for user in kept.restore().record["table"]["users"] if user)
        assert extract_user(out / "checkpoints", seated).provenance["step"] == step
    world.run(*world.train(out), processes=1, devices=2)
    assert_equal_runs(out, straight)


@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_invariant_6_a_lost_process_is_named_in_time_and_the_run_resumes_bitwise(world, together, victim, number):
    out = world.folder / f"lost-{victim}-{number.name}"
    command = world.train(out, "--lost_after", str(world.lost_after))
    with world.launched(*command) as launched:
        world.wait_for_rounds(out, 8, launched)
        pids, supervisors = world.workers(launched), world.children(launched.pid)
        os.kill(pids[victim], number)
        began = time.monotonic()
        while Path(f"/proc/{supervisors[1 - victim]}").exists() and supervisors[1 - victim] in world.children(
            launched.pid
        ):
            assert time.monotonic() - began < 5 * world.lost_after, "the other process hangs"
            time.sleep(0.05)
        if number == signal.SIGSTOP:
            os.kill(pids[victim], signal.SIGKILL)
        errors = launched.communicate(timeout=60)[1]
    assert launched.returncode == 75, errors
    assert "error: ProcessLostError: " in errors
    assert "start all processes again with the same command" in errors
    assert len(digests(out)) < 24, "the run was over before: give it more rounds"
    if number == signal.SIGSTOP:  # what is on the disk is as with a kill
        return
    world.run(*command)
    assert digests(out) == digests(together)
    assert [one["loss"] for one in read_metrics(out)] == [one["loss"] for one in read_metrics(together)]


def test_a_user_whom_one_process_cannot_train_is_set_aside_by_all(world):
    catalog, out = str(world.folder / "mixed"), world.folder / "mixed-run"
    few = ["--users_with_at_least", "11", "--catalog", catalog, "--gin_param", "TrainConfig.steps=2"]
    assert main(world.train(world.folder / "few", *few, "--gin_param", "AdapterConfig.rank=3")) == 0
    with world.launched(*world.train(out, "--catalog", catalog)) as launched:
        output, errors = launched.communicate(timeout=150)
    assert launched.returncode == 3, errors
    assert "18 users trained" in output
    assert "6 set aside" in output
    assert errors.count("set aside: u03: ") == 1
    opened = Catalog.open(catalog, read_only=True)
    ranks = {record.user: opened.history(record.user)[-1].config["rank"] for record in opened.list()}
    assert ranks == {f"u{user:02d}": 3 if user % 4 == 3 else 2 for user in range(24)}


FOREIGN = """
import os
if os.environ.get("JAX_PROCESS_ID") == "1" and "POPAX_SUPERVISED" in os.environ:
    from popax.data.pipeline import UserPipeline
    def broken(self, *batch):
        raise KeyError("an error of no kind that popax knows")
    UserPipeline.population = broken
"""


def test_an_error_that_is_not_popaxs_releases_the_other_processes(world, monkeypatch):
    folder = world.folder / "broken-code"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(FOREIGN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    command = world.train(world.folder / "foreign", "--lost_after", str(world.lost_after))
    with world.launched(*command) as launched:
        errors = launched.communicate(timeout=120)[1]
    assert launched.returncode in (70, 75), errors
    assert "KeyError: 'an error of no kind that popax knows'" in errors
    assert "ProcessLostError" in errors


def test_a_leaders_foreign_error_is_told_to_all(monkeypatch):
    """Process 0 fails inside `leader_first` with an error that has no name of popax's: nobody waits for it."""
    told = []

    def gather(self, value):
        told.append(value)
        return [told[0]]

    monkeypatch.setattr(ProcessGroup, "gather", gather)

    def broken():
        raise KeyError("lost")

    with pytest.raises(KeyError):
        ProcessGroup(index=0, count=2).leader_first(broken)
    with pytest.raises(ProcessError, match="process 0: KeyError: 'lost'"):
        ProcessGroup(index=1, count=2).leader_first(lambda: None)
