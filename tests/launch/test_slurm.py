"""launch/slurm.sh against an sbatch that runs the job at once, and an srun that ends as the test says."""

import pytest

from .conftest import TRAIN, Shell

OPTIONS = [
    "--nodes",
    "2",
    "--gpus_per_node",
    "4",
    "--time",
    "12:00:00",
    "--partition",
    "gpu",
    "--popax",
    "/env/bin/popax",
]
POPAX = " ".join(["/env/bin/popax", *TRAIN[1:], "--distributed"])
SBATCH = (
    "sbatch --job-name=popax --nodes=2 --ntasks-per-node={tasks} --gpus-per-node=4 --time=12:00:00 --signal=TERM@120 "
    "--requeue --open-mode=append --output=popax-%j.log --partition=gpu"
)


def submit(shell: Shell, srun_ends_with: int, restarts: int = 0, *words: str):
    shell.add("sbatch", f"SLURM_JOB_ID=7 SLURM_RESTART_COUNT={restarts} bash -s")
    shell.add("srun", f'printf "%s\\n" "devices ${{JAX_LOCAL_DEVICE_IDS-}}" >> calls; exit {srun_ends_with}')
    shell.add("scontrol", "")
    return shell.run("slurm.sh", *OPTIONS, *words, *TRAIN)


@pytest.mark.parametrize(("unit", "tasks", "devices"), [("gpu", 4, ""), ("node", 1, "0,1,2,3")])
def test_a_job_that_ends_well_is_over(shell, unit, tasks, devices):
    result = submit(shell, 0, 0, "--one_process_a", unit)
    assert result.returncode == 0, result.stderr
    assert shell.calls() == [
        SBATCH.format(tasks=tasks),
        f"srun --kill-on-bad-exit=0 {POPAX}",
        f"devices {devices}",
    ]


@pytest.mark.parametrize("code", [75, 130, 143])
def test_a_run_that_saved_or_lost_a_process_comes_again(shell, code):
    result = submit(shell, code)
    assert result.returncode == 0
    assert shell.calls()[-1] == "scontrol requeue 7"


@pytest.mark.parametrize(("code", "restarts"), [(2, 0), (137, 0), (143, 20)])
def test_a_run_that_failed_or_came_too_often_does_not(shell, code, restarts):
    result = submit(shell, code, restarts)
    assert result.returncode == code
    assert not any(call.startswith("scontrol") for call in shell.calls())
    assert ("raise --max_restarts" in result.stdout) == (restarts == 20)


def test_dry_run_prints_what_is_submitted(shell):
    """The script that is printed is, byte for byte, the one that sbatch is given."""
    dry = shell.run("slurm.sh", *OPTIONS, "--dry-run", *TRAIN)
    command, script = dry.stdout.split(" <<'JOB'\n")
    shell.add("sbatch", "cat > submitted")
    assert shell.run("slurm.sh", *OPTIONS, *TRAIN).returncode == 0
    assert shell.calls() == [command] == [SBATCH.format(tasks=4)]
    assert (shell.folder / "submitted").read_text() == script.removesuffix("JOB\n")


def test_words_with_spaces_and_quotes_arrive_whole(shell):
    shell.add("sbatch", "bash -s")
    shell.add("srun", 'printf "%s\\n" "${@: -2:1}" > word')
    shell.run("slurm.sh", *OPTIONS, "--", "generate", "--prompt", 'how\'s $HOME; `date` "x"')
    assert (shell.folder / "word").read_text() == 'how\'s $HOME; `date` "x"\n'
