"""Compilation in a process of its own: the TPU compiler's settings must be there before Python imports jax.

`python -m popax.plan.child` reads a pickled (config, model, step) from standard input and writes a pickled Compiled, or
the PopaxError that stopped it, to standard output.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from popax.bench.kernels.environment import ENVIRONMENT
from popax.errors import PlanError, PopaxError

HEARTBEAT_S = 15.0


def compile_apart(config: Any, model: Any, step: str, say: Callable[[str], None] = lambda line: None) -> Any:
    """`popax.plan.compiler.compile_step` in a child process. Raises what it raises; PlanError where the child dies."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as request, tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as log:
        try:
            pickle.dump((config, model, step), request)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise PlanError(
                f"the plan cannot be handed to the compiling process: {error}; use named functions"
            ) from error
        request.seek(0)
        environment = os.environ | ENVIRONMENT | {"XLA_FLAGS": ""}
        command = [sys.executable, "-m", "popax.plan.child"]
        with subprocess.Popen(command, stdin=request, stdout=answer, stderr=log, env=environment) as child:
            try:
                while True:
                    try:
                        child.wait(HEARTBEAT_S)
                        break
                    except subprocess.TimeoutExpired:
                        say(f"{step}: compiling, {time.monotonic() - started:.0f} s")
            except BaseException:
                child.kill()
                raise
        answer.seek(0)
        written = answer.read()
        if child.returncode or not written:
            log.seek(0)
            last = log.read().decode(errors="replace").strip().splitlines()[-12:]
            raise PlanError(
                f"the compiling process ended with {child.returncode} in the {step} step: {' / '.join(last)}"
            )
    result = pickle.loads(written)
    if isinstance(result, PopaxError):
        raise result
    return result


def main() -> int:
    # Whatever else prints must not get between the answer's bytes.
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    config, model, step = pickle.load(sys.stdin.buffer)
    try:
        from popax.bench.kernels.aot import require_compiler
        from popax.plan.compiler import compile_step

        require_compiler()
        result = compile_step(config, model, step)
    except PopaxError as error:
        result = error
    pickle.dump(result, answer)
    answer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
