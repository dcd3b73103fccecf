"""The parent of one of several processes: what ends the child without a word is named here. It never imports jax.

jax aborts a process whose coordinator is gone, and the kernel kills one that needs too much memory: neither leaves
Python a chance to say what happened and what to do.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from popax.distributed.messages import lost_message
from popax.errors import ProcessLostError

SUPERVISED = "POPAX_SUPERVISED"
FORWARDED = (signal.SIGTERM, signal.SIGINT)


def is_supervised() -> bool:
    """Whether this process is the child."""
    return SUPERVISED in os.environ


def supervise(arguments: Sequence[str]) -> int:
    """Run `popax *arguments` in a child, hand signals on, and return its exit code.

    A child that a signal ended becomes ProcessLostError's exit code, after its message.
    """
    # A session of its own: Ctrl-C reaches it once, through the parent.
    child = subprocess.Popen(
        [sys.executable, "-m", "popax.cli", *arguments],
        env=os.environ | {SUPERVISED: str(os.getpid())},
        start_new_session=True,
    )
    previous = {number: signal.signal(number, lambda got, _: child.send_signal(got)) for number in FORWARDED}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if child.poll() is None:
            child.kill()
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    if code == -signal.SIGABRT:  # jax's own word for it
        message = lost_message("another process, most likely process 0,", f"{name} ended this one, as jax does then")
    else:
        message = lost_message("this process", f"{name} ended it")
    print(f"error: {ProcessLostError.__name__}: {message}", file=sys.stderr, flush=True)
    return ProcessLostError.exit_code
