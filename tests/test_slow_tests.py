"""slow.txt: what it takes, and that its names are there."""

from pathlib import Path

from tests.slow_tests import chosen, slow_tests

ROOT = Path(__file__).parents[1]


def test_what_is_above_the_limit_is_slow_and_each_test_keeps_a_fast_form():
    seconds = {
        "a::one": 4.0,
        "a::two": 2.0,
        "a::cases[x]": 9.0,
        "a::cases[y]": 8.0,
        "a::cases[z]": 1.0,
        "a::only[x]": 5.0,
    }
    assert chosen(seconds, 3.0) == ["a::cases[x]", "a::cases[y]", "a::one", "a::only[x]"]
    assert chosen({"a::cases[x]": 9.0, "a::cases[y]": 8.0}, 3.0) == ["a::cases[x]"]


def test_names_are_of_tests_that_are_there():
    """A test that was renamed is fast again until the list is written anew: that should be known."""
    gone = []
    for name in slow_tests():
        file, _, test = name.partition("::")
        text = (ROOT / file).read_text() if (ROOT / file).is_file() else ""
        if f"def {test.partition('[')[0]}(" not in text:
            gone.append(name)
    assert gone == []
