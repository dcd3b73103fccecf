"""Which tests are slow by what they took: slow.txt, as `make test-times ARGS='--write-slow'` last wrote it.

A test that is slow whatever the machine (it sleeps, it kills, it has thousands of users) says so itself, by its mark.
"""

from collections.abc import Mapping
from pathlib import Path

# Fast whatever they take: what a change breaks first, and the first test of a server that many others then use.
KEPT = (
    "tests/test_floors.py",
    "tests/serving/http/test_openai_api.py::test_a_completion_is_the_users_own",
)
PLACE = Path(__file__).with_name("slow.txt")
HEADER = "# Written by make test-times ARGS=--write-slow: tests of more than {limit} CPU seconds, compiling included.\n"


def slow_tests() -> frozenset[str]:
    """Names as pytest gives them."""
    lines = PLACE.read_text(encoding="utf-8").splitlines() if PLACE.exists() else []
    return frozenset(line for line in lines if line and not line.startswith("#"))


def chosen(seconds: Mapping[str, float], limit: float) -> list[str]:
    """The tests above the limit; of a test with parameters the quickest case is not, so that each keeps a fast form."""
    cases: dict[str, list[str]] = {}
    for test in seconds:
        cases.setdefault(test.partition("[")[0], []).append(test)
    quickest = {min(tests, key=seconds.__getitem__) for tests in cases.values() if len(tests) > 1}
    slow = {test for test, spent in seconds.items() if spent > limit and not test.startswith(KEPT)}
    return sorted(slow - quickest)


def write_slow(seconds: Mapping[str, float], limit: float) -> list[str]:
    """Writes and returns `chosen`."""
    tests = chosen(seconds, limit)
    PLACE.write_text(HEADER.format(limit=f"{limit:g}") + "".join(f"{test}\n" for test in tests), encoding="utf-8")
    return tests
