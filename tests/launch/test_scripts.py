"""What holds for every launcher: shellcheck finds nothing, --help has an example that works, bad input is refused."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = ("tpu_queued_resource.sh", "gke_jobset.sh", "slurm.sh", "local.sh")
TRAIN = "-- train --gin_file configs/runs/irc_ubuntu_users.gin --out /bucket/runs --no_table"
TPU = "run --name irc --project p --zone z --topology v5e:2x2"
GKE = "--name irc --topology v5e:4x4 --image registry/popax:1 --bucket b-1"
SLURM = "--nodes 2 --gpus_per_node 8 --time 60"


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which("shellcheck")
    assert program, "shellcheck is missing: pip install -e '.[dev]'"
    scripts = sorted(map(str, LAUNCH.glob("*.sh")))
    assert len(scripts) > len(SCRIPTS)
    result = subprocess.run([program, *scripts], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_example_in_the_help_runs_dry(shell, script):
    """With no gcloud, kubectl or sbatch on PATH."""
    result = shell.run(script, "--help")
    assert result.returncode == 0
    example = result.stdout.partition("\nexample\n")[2].replace("\\\n", " ")
    name, *words = shlex.split(example)
    assert name == f"launch/{script}"
    at = words.index("--")
    dry = shell.run(script, *words[:at], "--dry-run", *words[at:])
    assert (dry.returncode, dry.stderr) == (0, "")
    assert "--distributed" in dry.stdout


@pytest.mark.parametrize(("script", "words"), list(zip(SCRIPTS, (TPU, GKE, SLURM, ""))))
def test_without_its_tool_a_launcher_says_so(shell, script, words):
    result = shell.run(script, *f"{words} {TRAIN}".split())
    assert result.returncode == 2
    assert "is not on PATH: install it, or see the commands with --dry-run" in result.stderr


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("tpu_queued_resource.sh", "--dry-run", "unknown action --dry-run; one of: run create"),
        ("tpu_queued_resource.sh", "rent --name irc --project p --zone z", "unknown action rent"),
        ("tpu_queued_resource.sh", f"run --name irc --project p {TRAIN}", "--zone is missing"),
        ("tpu_queued_resource.sh", f"{TPU.replace('irc', 'Irc_1')} {TRAIN}", "--name 'Irc_1'"),
        (
            "tpu_queued_resource.sh",
            f"{TPU.replace('v5e:2x2', 'v5e:2x2x2')} {TRAIN}",
            "v5e has two axes, such as",
        ),
        ("tpu_queued_resource.sh", f"{TPU.replace('v5e:2x2', 'v5p-8')} {TRAIN}", "such as v5p:4x4x2"),
        ("tpu_queued_resource.sh", f"{TPU.replace('v5e:2x2', 'tpu7x:2x2x1')} {TRAIN}", "use launch/gke_jobset.sh"),
        ("tpu_queued_resource.sh", f"{TPU} --spot {TRAIN}", "--out would be lost with the slice"),
        ("tpu_queued_resource.sh", f"{TPU} --package /nowhere {TRAIN}", "--package /nowhere: neither a wheel"),
        ("tpu_queued_resource.sh", f"{TPU} --poll", "--poll needs a value"),
        ("tpu_queued_resource.sh", f"delete --name irc --project p --zone z {TRAIN}", "delete takes no popax command"),
        ("gke_jobset.sh", f"--name irc --topology v5e:4x4 --bucket b {TRAIN}", "--image is missing"),
        ("gke_jobset.sh", f"{GKE} --chips_per_host 3 {TRAIN}", "has 16 chips: no multiple of --chips_per_host 3"),
        ("gke_jobset.sh", f"{GKE.replace('b-1', 'gs://b')} {TRAIN}", "without gs:// and folders"),
        ("gke_jobset.sh", f"{GKE} --slices 0 {TRAIN}", "--slices '0': a whole number of at least 1"),
        ("gke_jobset.sh", f"{GKE} {TRAIN.replace('irc_ubuntu_users', 'nobody')}", "configs/runs/nobody.gin: not in"),
        ("gke_jobset.sh", f"{GKE} {TRAIN[3:]}", "unexpected 'train'"),
        ("slurm.sh", f"{SLURM.replace('60', 'soon')} {TRAIN}", "--time 'soon'"),
        ("slurm.sh", f"{SLURM} --one_process_a rack {TRAIN}", "--one_process_a 'rack': gpu or node"),
        ("slurm.sh", f"{SLURM} --nodes 1e3 {TRAIN}", "--nodes '1e3'"),
        ("slurm.sh", SLURM, "no popax command"),
        ("slurm.sh", f"{SLURM} -- pretrain --out x", "popax pretrain: give one of: train generate"),
        ("slurm.sh", f"{SLURM} -- train --no_table", "popax train needs --out DIR"),
        ("slurm.sh", f"{SLURM} -- train --out x", "several processes make no table; add --no_table"),
        ("local.sh", "", "no popax command"),
        ("local.sh", "train", "unexpected 'train'"),
        ("local.sh", f"--processes 0 {TRAIN}", "--processes '0': a whole number of at least 1"),
        ("local.sh", f"--devices x {TRAIN}", "--devices 'x'"),
    ],
)
def test_bad_input_is_refused_with_its_value_and_the_fix(shell, script, words, message):
    result = shell.run(script, *words.split())
    assert result.returncode == 2
    assert result.stderr.startswith(f"{script}: error: ")
    assert message in result.stderr
    assert result.stdout == ""
