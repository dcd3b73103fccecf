"""A pytest plugin (`make test-times`): CPU seconds by test file, of the processes that its tests start too.

CPU seconds, not seconds: they say the same beside other work, and with any number of workers. A child counts when it
has been waited for, so what a module's server burns belongs to the last test of its module.
"""

import collections
import resource

import pytest

from tests.slow_tests import write_slow

SLOW = 1.25  # what takes longer, with an empty compile cache, is left to `make test-slow`


def cpu_seconds() -> float:
    """Of this process, every thread of it, and of every child that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class CpuTimes:
    def __init__(self) -> None:
        self.before = cpu_seconds()
        self.of_test: dict[str, float] = collections.defaultdict(float)
        self.slow: set[str] = set()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_collection(self):
        """Imports are nobody's: every worker makes all of them."""
        yield
        self.before = cpu_seconds()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item):
        """Where the test ran: in a worker, whose report carries the number to the process that prints it."""
        outcome = yield
        now = cpu_seconds()
        outcome.get_result().cpu_seconds = now - self.before
        self.before = now

    def pytest_runtest_logreport(self, report):
        self.of_test[report.nodeid] += report.cpu_seconds
        if "slow" in report.keywords:
            self.slow.add(report.nodeid)

    def pytest_terminal_summary(self, terminalreporter):
        of_file: dict[str, list[float]] = collections.defaultdict(list)
        for test, seconds in self.of_test.items():
            of_file[test.partition("::")[0]].append(seconds)
        terminalreporter.section("CPU seconds by file")
        for file, seconds in sorted(of_file.items(), key=lambda pair: sum(pair[1])):
            terminalreporter.write_line(f"{sum(seconds):8.1f}  {len(seconds):5d} tests  {file}")
        total = sum(self.of_test.values())
        terminalreporter.write_line(
            f"{total:8.1f}  {len(self.of_test):5d} tests  in all, without starting and collecting"
        )
        unmarked = {test: spent for test, spent in self.of_test.items() if spent > SLOW and test not in self.slow}
        for test, seconds in sorted(unmarked.items(), key=lambda pair: pair[1]):
            terminalreporter.write_line(f"{seconds:8.1f}  more than {SLOW:g}, and not marked slow: {test}")
        if terminalreporter.config.getoption("write_slow"):
            # Of all tests that might be fast: slow.txt was not looked at.
            write_slow({test: spent for test, spent in self.of_test.items() if test not in self.slow}, SLOW)
        if path := terminalreporter.config.getoption("cpu_times"):
            with open(path, "w") as out:
                out.writelines(f"{seconds:.3f}\t{test}\n" for test, seconds in self.of_test.items())


def pytest_addoption(parser):
    parser.addoption("--cpu-times", metavar="PATH", help="also write the CPU seconds of every test, one a line")
    parser.addoption("--write-slow", action="store_true", help="run what slow.txt names too, and write it anew")


def pytest_configure(config):
    config.pluginmanager.register(CpuTimes())
