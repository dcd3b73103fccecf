"""The mutation check itself: what each operator makes, what is left alone, which are drawn, what counts as seen."""

import ast
import json
import subprocess
import sys
import textwrap

import pytest

from tests.mutation.__main__ import ROOT, main, module_of
from tests.mutation.accepted import PLACE, Accepted, AcceptedError, check_accepted, read_accepted, reason_of
from tests.mutation.draw import draw
from tests.mutation.operators import mutants_of
from tests.mutation.sources import SOURCES


def changes(source, operator=None):
    """The whole text of each mutant of a source, and its operator."""
    found = mutants_of("some/file.py", textwrap.dedent(source))
    return [ast.unparse(one.make()) for one in found if operator in (None, one.operator)]


@pytest.mark.parametrize(
    ("operator", "source", "wanted"),
    [
        ("comparison turned", "y = f(a < b)", ["y = f(a <= b)"]),
        ("comparison turned", "y = a >= b", ["y = a > b"]),
        ("comparison turned", "y = 0 < a <= 1", ["y = 0 <= a <= 1", "y = 0 < a < 1"]),
        ("comparison turned", "y = a == b", ["y = a != b"]),
        ("comparison turned", "y = a is not None", ["y = a is None"]),
        ("comparison turned", "y = a in b", ["y = a not in b"]),
        ("comparison turned", "y = not a", ["y = a"]),
        ("off by one", "y = a + 1", ["y = a + 2", "y = a + 0"]),
        ("off by one", "y = f(a, 0)", ["y = f(a, 1)"]),
        ("off by one", "y = a[b:c]", ["y = a[b + 1:c]", "y = a[b:c + 1]"]),
        ("off by one", "y = range(n)", ["y = range(n + 1)"]),
        ("argument dropped", "y = f(x, a=1.0, b=z)", ["y = f(x, b=z)", "y = f(x, a=1.0)"]),
        ("argument dropped", "y = f([a, b])", ["y = f([b])", "y = f([a])"]),
        ("argument dropped", "y = f'{a}/{b}'", ["y = f'/{b}'", "y = f'{a}/'"]),
        ("argument dropped", "y = a - b", ["y = a"]),
        ("argument dropped", "y = a * b", ["y = a", "y = b"]),
        ("argument dropped", "y = max(a, b)", ["y = a", "y = b"]),
        ("branch removed", "if a:\n    b()", ["if a:\n    pass"]),
        ("branch removed", "if a:\n    b()\nelse:\n    c()", ["if a:\n    pass\nelse:\n    c()", "if a:\n    b()"]),
        ("branch removed", "y = a if c else b", ["y = a", "y = b"]),
        ("branch removed", "y = jnp.where(c, a, b)", ["y = a", "y = b"]),
        ("branch removed", "y = a and b", ["y = b", "y = a"]),
        ("branch removed", "y = a & b", ["y = a", "y = b"]),
        ("branch removed", "y = [a for a in b if a]", ["y = [a for a in b]"]),
        ("operands swapped", "y = a // b", ["y = b // a"]),
        ("operands swapped", "y = a - a", []),
        ("operands swapped", "y = f(a, b)", ["y = f(b, a)"]),
        ("operands swapped", "y = max(a, b)", []),
        ("operands swapped", "y = jnp.where(c, a, b)", ["y = jnp.where(c, b, a)"]),
    ],
)
def test_an_operator_makes_just_these(operator, source, wanted):
    assert changes(source, operator) == wanted


@pytest.mark.parametrize(
    "source",
    [
        "LIMIT = 16",
        "ONE, TWO = 1.0, 2.0",
        "DAY = datetime.date(2025, 1, 1)",
        "'''Text of 1 < 2.'''",
        "import a",
        "raise Error(f'{a} < {b}')",
        "assert a < 1",
        "def f(x: Literal[1, 2] = 3) -> Literal[4]: return x",
        "class A(NamedTuple):\n    a: int = 3",
        "@dataclass(frozen=True)\nclass A:\n    pass",
        "Kind = Literal[1, 2]",
        "y = zip(a, strict=True)",
    ],
)
def test_what_checks_or_describes_or_chooses_is_left_alone(source):
    assert changes(source) == []


SAMPLE = '''
def seed_of(user, seed):
    """0 < 1."""
    return digest(f"{seed}/{user}")


class Counter:
    def stale(self, gain):
        self.count = 0 if gain else self.count + 1
        return self.count
'''


def test_a_mutant_says_where_it_is_and_is_known_without_its_number():
    found = mutants_of("some/file.py", SAMPLE)
    assert [(one.scope, one.number, one.change) for one in found][:2] == [
        ("seed_of", 4, "'...{seed}...' -> '......'"),
        ("seed_of", 4, "'...{user}...' -> '......'"),
    ]
    assert found[2].scope == "Counter.stale"
    assert "0 if gain else self.count + 1 -> self.count + 1" in [one.change for one in found]
    lower = mutants_of("some/file.py", "import first\n\n" + SAMPLE)
    assert [one.key for one in lower] == [one.key for one in found]
    assert [one.number for one in lower] == [one.number + 2 for one in found]
    assert len({one.key for one in found}) == len(found)


def everything():
    return [mutant for file in SOURCES for mutant in mutants_of(file, (ROOT / file).read_text(encoding="utf-8"))]


def test_a_draw_is_the_seeds_and_the_sources():
    every = everything()
    drawn = draw(every, 120, 0)
    assert [one.key for one in draw(every[::-1], 120, 0)] == [one.key for one in drawn]
    assert len({one.key for one in drawn}) == 120
    assert {one.key for one in draw(every, 120, 1)} != {one.key for one in drawn}
    assert {one.key for one in draw(every, 60, 0)} < {one.key for one in drawn}
    # Every file has its turn, and every operator.
    assert {one.file for one in drawn} == set(SOURCES)
    assert {one.operator for one in drawn} == {one.operator for one in every}
    assert len(draw(every, 10_000, 0)) == len(every)


def test_an_edit_of_one_line_leaves_the_rest_of_a_draw():
    longer = SAMPLE.replace("return self.count", "return self.count - self.start")
    before, after = (draw(mutants_of("some/file.py", source), 100, 0) for source in (SAMPLE, longer))
    assert {one.key for one in before} < {one.key for one in after}


def test_every_mutant_of_the_sources_is_a_program():
    for mutant in draw(everything(), 200, 5):
        compile(mutant.make(), mutant.file, "exec")


def test_the_tests_of_every_source_are_there():
    for source, tests in SOURCES.items():
        assert (ROOT / source).is_file()
        assert tests
        assert all((ROOT / test.partition("::")[0]).is_file() for test in tests)


def entry(mutant, reason="no test can see it"):
    return Accepted(mutant.file, mutant.scope, mutant.line, mutant.operator, mutant.change, reason)


def test_what_is_accepted_fits_a_line_and_lives():
    mutants = mutants_of("some/file.py", SAMPLE)
    fits = entry(mutants[0])
    check_accepted([fits], mutants, [])
    assert reason_of(mutants[0], [fits]) == "no test can see it"
    assert reason_of(mutants[1], [fits]) is None
    with pytest.raises(AcceptedError, match="a test kills it"):
        check_accepted([fits], mutants, [mutants[0]])
    for gone in (fits._replace(line="another line"), fits._replace(scope=""), fits._replace(operator="off by one")):
        with pytest.raises(AcceptedError, match="no such line or change any more"):
            check_accepted([gone], mutants, [])


def test_the_accepted_ones_of_the_repository_fit():
    check_accepted(read_accepted(PLACE.read_text(encoding="utf-8")), everything(), [])
    with pytest.raises(AcceptedError, match="without a reason"):
        read_accepted(
            '[[survivor]]\nfile = "f"\nscope = ""\nline = "l"\noperator = "o"\nchange = "a -> b"\nreason = " "'
        )


CODE = """
def clipped(value, most):
    return most if value > most else value


def halves(value):
    count = 0
    while value > 1:
        value, count = value // 2, count + 1
    return count
"""
SEEN = """
import mutated_sample


def test_clipped():
    assert [mutated_sample.clipped(value, 3) for value in (1, 3, 5)] == [1, 3, 3]


def test_halves():
    assert mutated_sample.halves(8) == 3
"""


# In a process of its own: the one of the tests has started JAX, and forks no more.
ALONE = """
import json, sys
from pathlib import Path
from tests.mutation import run
from tests.mutation.operators import mutants_of

folder, wanted = Path(sys.argv[1]), sys.argv[2:]
sys.path.insert(0, str(folder))
path, tests = folder / "mutated_sample.py", (str(folder / "test_sample.py"),)
made = {one.change: one.make for one in mutants_of(path.name, path.read_text())}
ended = dict(run.outcomes([run.Job("mutated_sample", path, made[change], tests, 0.0) for change in wanted], 2))
print(json.dumps([ended[index][:2] for index in range(len(wanted))]))
"""


@pytest.mark.slow
def test_a_process_tells_which_test_saw_it_and_one_that_never_ends_is_seen(tmp_path):
    """Without an end where `value // 2` is `value`; at the threshold both branches give the same."""
    (tmp_path / "mutated_sample.py").write_text(CODE)
    (tmp_path / "test_sample.py").write_text(SEEN)
    wanted = ["value > most -> value >= most", "most if value > most else value -> value", "value // 2 -> value"]
    command = [sys.executable, "-c", ALONE, str(tmp_path), *wanted]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lives, seen, endless = json.loads(done.stdout)
    assert lives == [False, ""]
    assert seen[0]
    assert seen[1].endswith("::test_clipped")
    assert endless == [True, "time"]


def test_the_command_says_which_files_there_are(capsys):
    assert main(["--file", "nothing.py"]) == 2
    assert "popax/evaluation/gate.py" in capsys.readouterr().err
    assert module_of("tests/data/test_users.py::test_x") == "tests.data.test_users"
