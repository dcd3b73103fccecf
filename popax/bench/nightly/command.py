"""popax's own command as a child: timed, watched for its first round, and killed where that is asked for."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from popax.errors import PopaxError
from popax.training.metrics import read_metrics


class Ended(NamedTuple):
    """first_round: seconds until a round's metrics were there, None where none came; peak_bytes: of resident memory."""

    code: int
    seconds: float
    first_round: float | None
    peak_bytes: int


def popax_command(arguments: Sequence[str], run: Path, *, kill_after: int | None = None) -> Ended:
    """Run `popax ARGUMENTS`, whose run directory is `run`; kill_after: SIGKILL after so many of its rounds.

    Raises PopaxError, with the last of what it wrote, where it ends otherwise than well, with users set aside, or by
    the kill that was asked for.
    """
    began, before = time.monotonic(), _rounds(run)
    first, log = None, run.with_name(f"{run.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        child = subprocess.Popen([sys.executable, "-m", "popax.cli", *arguments], stdout=output, stderr=output)
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            rounds = _rounds(run) - before
            if first is None and rounds > 0:
                first = time.monotonic() - began
            if pid:
                break
            if kill_after is not None and rounds >= kill_after:
                child.send_signal(signal.SIGKILL)
                kill_after = None
            time.sleep(0.02)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode not in (0, 3, -signal.SIGKILL):
        said = " ".join(log.read_text(encoding="utf-8", errors="replace").split()[-60:])
        raise PopaxError(f"popax {' '.join(arguments)} ended with {child.returncode}: {said}")
    return Ended(child.returncode, time.monotonic() - began, first, usage.ru_maxrss * 1024)


def _rounds(run: Path) -> int:
    return len(read_metrics(run)) if (run / "metrics.jsonl").exists() else 0
