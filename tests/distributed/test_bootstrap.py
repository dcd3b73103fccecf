"""What is wrong is refused by name before anything starts; the launcher says what it would run."""

import os
import re
import subprocess
from pathlib import Path

import jax
import pytest

from popax.cli.main import main
from popax.distributed.bootstrap import ProcessConfig
from popax.distributed.group import ProcessGroup
from popax.distributed.supervisor import supervise
from popax.errors import ConfigError
from popax.population.placement import Placement
from popax.sharding import make_mesh

LAUNCH = Path(__file__).parents[2] / "launch" / "local.sh"


def test_the_environment_fills_in_what_flags_do_not_say():
    environment = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert ProcessConfig().with_environment(environment) == ProcessConfig(
        coordinator="host:1", num_processes=4, process_id=3
    )
    given = ProcessConfig(coordinator="other:2", num_processes=2, process_id=0)
    assert given.with_environment(environment) == given
    assert ProcessConfig().with_environment({}) == ProcessConfig()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"coordinator": "host:1"}, "give all three"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "HOST:PORT"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 2}, "process_id=2 of num_processes=2"),
        ({"lost_after": 0.0}, "at least 1 second"),
    ],
)
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        ProcessConfig(**settings)


def test_numbers_in_the_environment_are_numbers():
    with pytest.raises(ConfigError, match="whole numbers"):
        ProcessConfig().with_environment({"JAX_NUM_PROCESSES": "two"})


def test_one_process_is_a_group_of_one():
    group = ProcessGroup.current()
    assert (group.count, group.leads, group.gather({"a": 1}), group.any_of(False)) == (1, True, [{"a": 1}], False)
    assert group.leader_first(lambda: 5) == 5


@pytest.mark.parametrize("text", ["population=3", "people=8", "population=8,population=1", "population", "fsdp=0"])
def test_a_mesh_that_the_devices_do_not_make_is_refused(text):
    with pytest.raises(ConfigError, match="mesh"):
        make_mesh(text)


def test_every_slot_has_one_owner_and_slots_divide():
    placement = Placement(16, make_mesh("population=4,fsdp=2"))
    assert placement.local_slots == list(range(16))
    assert all(placement.owns(slot) for slot in range(16))
    with pytest.raises(ConfigError, match=r"TrainConfig\.slots to a multiple of 4"):
        Placement(6, make_mesh("population=4,fsdp=2"))


def test_a_member_goes_to_its_slot_and_comes_back():
    placement = Placement(8, make_mesh("population=4,fsdp=2"))
    state = placement.rows({"x": jax.numpy.zeros((8, 3)).__array__()})
    one = {"x": jax.numpy.arange(3.0)}
    state = jax.jit(placement.insert_member)(state, 5, placement.insertable(5, one, state))
    assert placement.host(state)["x"].tolist() == [[0, 1, 2] if slot == 5 else [0, 0, 0] for slot in range(8)]
    members = jax.jit(placement.gather_member, out_shardings=placement.over_population)(state, 5)
    assert placement.gathered(members, 5)["x"].tolist() == [0, 1, 2]


def test_a_process_that_meets_nobody_says_so(capfd):
    """The coordinator's port is closed: nobody will come."""
    place = ["--coordinator", "127.0.0.1:1", "--num_processes", "2", "--process_id", "1", "--start_within", "1"]
    assert main(["generate", "--base", "nowhere", "--prompt", "a", "--distributed", *place]) == 75
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ProcessLostError: ")
    assert "start all processes again" in error


def test_a_child_that_a_signal_ended_is_named(capfd, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGABRT)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert supervise(["--version"]) == 75
    message = "error: ProcessLostError: another process, most likely process 0, of this run is lost (SIGABRT"
    assert message in capfd.readouterr().err
    monkeypatch.delenv("PYTHONPATH")
    assert supervise(["--version"]) == 0
    assert supervise(["no_such_command"]) == 2


def test_a_dry_run_prints_one_command_a_process_and_starts_none():
    done = subprocess.run(
        [LAUNCH, "--processes", "3", "--devices", "2", "--dry-run", "--", "train", "--out", "my run", "--no_table"],
        capture_output=True, text=True, check=True, env=os.environ | {"POPAX_PYTHON": "py", "XLA_FLAGS": ""},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for index, line in enumerate(lines):
        assert f"JAX_NUM_PROCESSES=3 JAX_PROCESS_ID={index} " in line
        assert "xla_force_host_platform_device_count=2" in line
        assert line.endswith("py -m popax.cli train --out 'my run' --no_table --distributed")


def test_the_table_is_left_to_one_process(monkeypatch, capsys):
    monkeypatch.setattr(ProcessGroup, "current", classmethod(lambda cls: cls(index=0, count=2)))
    assert main(["train", "--base", "b", "--data", "d", "--out", "o"]) == 2
    assert "give --no_table, then run popax eval" in capsys.readouterr().err
