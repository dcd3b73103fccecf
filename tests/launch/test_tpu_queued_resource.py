"""launch/tpu_queued_resource.sh against a gcloud whose requests go through the states that the test says."""

from .conftest import TRAIN, Shell

NAME = ["--name", "irc", "--project", "p", "--zone", "z"]
RUN = ["run", *NAME, *["--topology", "v5p:2x2x2", "--spot", "--poll", "1", "--setup", "mount-it", "--package"]]
# describe answers the next line of `states`, the last one for ever; popax ends with the next line of `codes`.
GCLOUD = """
next() { head -n 1 "$1"; [[ $(cat "$1") != *$'\\n'* ]] || { tail -n +2 "$1" > rest; cp rest "$1"; }; }
case "$*" in
  *" describe "*) next states ;;
  *systemd-run*) exit "$(next codes)" ;;
esac
"""


def slice_of(shell: Shell, states: list[str], codes: list[int]) -> list[str]:
    (shell.folder / "states").write_text("\n".join(states) + "\n")
    (shell.folder / "codes").write_text("\n".join(map(str, codes)) + "\n")
    shell.add("gcloud", GCLOUD)
    wheel = shell.folder / "popax-0.1.0-py3-none-any.whl"
    wheel.touch()
    return [*RUN, str(wheel), *TRAIN]


def verbs(shell: Shell) -> list[str]:
    """What was done, without looking at the state."""
    known = {
        "queued-resources create": "create",
        "queued-resources delete": "delete",
        "mount-it": "setup",
        "tpu-vm scp": "copy",
        "command -v python3.11": "python",
        "pip install": "install",
        "systemd-run": "start",
    }
    calls = [call for call in shell.calls() if " describe " not in call]
    return [next(verb for words, verb in known.items() if words in call) for call in calls]


ONCE = ["create", "setup", "copy", "python", "install", "start"]


def test_a_run_waits_installs_trains_and_gives_back(shell):
    result = shell.run("tpu_queued_resource.sh", *slice_of(shell, ["WAITING_FOR_RESOURCES", "ACTIVE"], [0]))
    assert result.returncode == 0, result.stderr
    assert verbs(shell) == [*ONCE, "delete"]
    assert "irc is WAITING_FOR_RESOURCES\n" in result.stderr


def test_a_slice_that_is_taken_away_is_requested_again_and_the_same_command_continues(shell):
    states = ["ACTIVE", "SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE"]
    result = shell.run("tpu_queued_resource.sh", *slice_of(shell, states, [143, 0]))
    assert result.returncode == 0, result.stderr
    assert verbs(shell) == [*ONCE, "delete", *ONCE, "delete"]
    starts = [call for call in shell.calls() if "systemd-run" in call]
    assert starts[0] == starts[1]
    assert starts[0].endswith(f"train {' '.join(TRAIN[2:])} --distributed")


def test_a_connection_lost_before_the_state_says_so_is_a_preemption(shell):
    result = shell.run("tpu_queued_resource.sh", *slice_of(shell, ["ACTIVE", "SUSPENDING", "ACTIVE"], [255, 0]))
    assert result.returncode == 0, result.stderr
    assert verbs(shell) == [*ONCE, "delete", *ONCE, "delete"]


def test_a_request_that_fails_is_made_again(shell):
    result = shell.run("tpu_queued_resource.sh", *slice_of(shell, ["FAILED", "ACTIVE"], [0]))
    assert result.returncode == 0, result.stderr
    assert verbs(shell) == ["create", "delete", *ONCE, "delete"]


def test_a_lost_process_starts_again_on_the_same_slice(shell):
    result = shell.run("tpu_queued_resource.sh", *slice_of(shell, ["ACTIVE"], [75, 0]))
    assert result.returncode == 0, result.stderr
    assert verbs(shell) == [*ONCE, "start", "delete"]


def test_an_error_of_popax_keeps_the_slice_for_its_logs(shell):
    result = shell.run("tpu_queued_resource.sh", *slice_of(shell, ["ACTIVE"], [2]))
    assert result.returncode == 3
    assert "popax ended with 2" in result.stderr
    assert "tpu_queued_resource.sh logs --name irc --project p --zone z" in result.stderr
    assert verbs(shell) == ONCE


def test_it_gives_up_after_max_restarts(shell):
    words = slice_of(shell, ["ACTIVE"], [75])
    result = shell.run("tpu_queued_resource.sh", words[0], "--max_restarts", "2", *words[1:])
    assert result.returncode == 2
    assert "stopped 3 times, --max_restarts 2" in result.stderr
    assert verbs(shell) == [*ONCE, "start", "start"]


def test_dry_run_prints_the_commands(shell):
    words = slice_of(shell, [], [])
    shell.run("tpu_queued_resource.sh", words[0], "--dry-run", *words[1:])
    assert not (shell.folder / "calls").exists()
    result = shell.run("tpu_queued_resource.sh", words[0], "--dry-run", *words[1:])
    where, ssh = "--project=p --zone=z", "gcloud compute tpus tpu-vm ssh irc --project=p --zone=z --worker=all"
    unit = "sudo systemd-run --unit=popax --wait --collect --property=KillMode=mixed --property=TimeoutStopSec=120"
    user = '--uid="$(id -un)" --setenv=HOME="$HOME" --working-directory="$HOME"'
    log = '--property=StandardOutput="append:$HOME/popax.log" --property=StandardError="append:$HOME/popax.log"'
    packages = "sudo apt-get update -q && sudo apt-get install -qy python3.11 python3.11-venv"
    python = f"command -v python3.11 >/dev/null || {{ {packages}; }}"
    pip = "~/popax-env/bin/pip install --quiet"
    wheel = "popax-0.1.0-py3-none-any.whl"
    assert result.stdout.splitlines() == [
        f"gcloud compute tpus queued-resources create irc {where} --node-id=irc --accelerator-type=v5p-16 "
        "--runtime-version=v2-alpha-tpuv5 --spot",
        f"gcloud compute tpus queued-resources describe irc {where} '--format=value(state.state)'",
        f"{ssh} --command=mount-it",
        f"gcloud compute tpus tpu-vm scp {shell.folder}/{wheel} irc:{wheel} {where} --worker=all",
        f"{ssh} '--command={python}'",
        f"{ssh} '--command=python3.11 -m venv ~/popax-env && {pip} \"$HOME/{wheel}[tpu]\"'",
        f'{ssh} \'--command=sudo systemctl stop popax 2>/dev/null; {unit} {user} {log} "$HOME/popax-env/bin/popax" '
        f"{' '.join(TRAIN[1:])} --distributed'",
        f"gcloud compute tpus queued-resources delete irc {where} --force --quiet",
    ]
