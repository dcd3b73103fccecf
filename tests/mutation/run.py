"""Each mutant against its tests: in a process of its own, forked from one that has all but popax imported."""

import ast
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType
from typing import NamedTuple

# A mutant that loops for ever is one whose tests fail: after so many times what its tests take, and some seconds more.
# Seconds of the processor, so that a busy machine kills nobody; of the clock, many more, for one that waits for ever.
TIMES, SECONDS_MORE, WALL_SECONDS = 3, 5, 120
DATA_BYTES = 6 << 30  # and one that fills the memory


class Job(NamedTuple):
    """A module with the tree it is to have (None: its own), the tests that tell, and how long those take."""

    module: str
    path: Path
    make: Callable[[], ast.Module] | None
    tests: tuple[str, ...]
    seconds: float = 20.0


class Outcome(NamedTuple):
    """killed: a test failed. by: which, or what ended the process. seconds: of the processor."""

    killed: bool
    by: str
    seconds: float


class TestsError(Exception):
    """The tests say nothing about a mutant: they fail without one, or there are none."""


def warm_up(modules: Sequence[str], ours: Sequence[str] = ("popax", "tests")) -> None:
    """Import these modules and let go of those that are ours: what is left is what they need, ready in every fork.

    JAX may be imported in a process that forks, but not have started: none of the modules computes.
    """
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    for module in ("tests.conftest", "pytest", "_pytest.assertion.rewrite", *modules):
        importlib.import_module(module)
    for name in [name for name in sys.modules if name.partition(".")[0] in ours and not inside_this(name)]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()


def inside_this(name: str) -> bool:
    """tests.mutation itself stays, and the package it is in."""
    return name == "tests" or name.startswith("tests.mutation")


def outcomes(jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, Outcome]]:
    """(index, outcome) of each job, as they end; `workers` at once."""
    waiting, running = list(enumerate(jobs))[::-1], {}
    with tempfile.TemporaryDirectory(prefix="popax-mutation-") as folder:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    index, job = waiting.pop()
                    place = Path(folder, str(index))
                    place.mkdir()
                    running[_fork(job, place)] = (index, place, time.monotonic())
                for pid, (index, place, start) in list(running.items()):
                    late = time.monotonic() - start > WALL_SECONDS
                    if late:
                        os.kill(pid, signal.SIGKILL)
                    ended, status, used = os.wait4(pid, 0 if late else os.WNOHANG)
                    if ended:
                        del running[pid]
                        yield index, _outcome(status, place, used.ru_utime + used.ru_stime)
                time.sleep(0.01)
        finally:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _fork(job: Job, place: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        pid = os.fork()
    if pid and any("JAX" in str(warning.message) for warning in warned):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise TestsError("JAX has started, and its threads are in no fork: a module of the tests computes on import")
    if pid:
        return pid
    code = 70  # what broke here is no test's failure
    try:
        seconds = int(TIMES * job.seconds) + SECONDS_MORE
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        output = os.open(place / "output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        code = _test(job, place)
    finally:
        os._exit(code)  # neither the parent's exit handlers nor its buffers are this process's


def _test(job: Job, place: Path) -> int:
    import hypothesis
    import pytest

    if job.make is not None:
        sys.meta_path.insert(0, _Instead(job))

    class Told:
        @pytest.hookimpl(trylast=True)
        def pytest_configure(self, config):
            # The same examples each time, and none made smaller: who failed is enough.
            phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
            mutation = hypothesis.settings(deadline=None, derandomize=True, database=None, phases=phases)
            hypothesis.settings.register_profile("mutation", mutation)
            hypothesis.settings.load_profile("mutation")

        def pytest_runtest_logreport(self, report):
            if report.failed and not (place / "by").exists():
                (place / "by").write_text(report.nodeid, encoding="utf-8")

    # Slow ones too: those of these files are seconds, and some mutants are seen by nothing else.
    options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-m", "not parity and not aot"]
    return int(pytest.main([*options, f"--basetemp={place / 'tmp'}", *job.tests], plugins=[Told()]))


class _Instead(importlib.abc.MetaPathFinder):
    """The job's module is made from its tree, wherever it is imported."""

    def __init__(self, job: Job):
        self._job = job

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self._job.module:
            return None
        return importlib.util.spec_from_file_location(fullname, self._job.path, loader=_Loader(self._job))


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, job: Job):
        super().__init__(job.module, str(job.path))
        self._make = job.make

    def get_code(self, fullname: str) -> CodeType:
        assert self._make is not None
        return compile(self._make(), self.path, "exec")


def _outcome(status: int, place: Path, seconds: float) -> Outcome:
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return Outcome(False, "", seconds)
    if code in (5, 70):
        raise TestsError(f"no test ran:\n{(place / 'output').read_text(encoding='utf-8')[-3000:]}")
    if code < 0:
        return Outcome(
            True, "time" if -code in (signal.SIGXCPU, signal.SIGKILL) else signal.Signals(-code).name, seconds
        )
    by = place / "by"
    return Outcome(True, by.read_text(encoding="utf-8") if by.exists() else "import", seconds)
