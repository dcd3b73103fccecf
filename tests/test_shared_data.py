"""Real inputs beside the checkout are read through tests/shared_data.py only; what lies in the checkout is there."""

import ast
from pathlib import Path

import pytest

from tests.shared_data import HF_CONFIGS, ROOT, SHARED, needs_shared

HERE = Path(__file__)
HELPER = ROOT / "tests" / "shared_data.py"


def places(source: str) -> list[int]:
    """The lines that name `../shared` as a path: in one string, or as "shared" joined to some folder's parent."""
    found = []
    for node in ast.walk(ast.parse(source)):
        whole = isinstance(node, ast.Constant) and isinstance(node.value, str) and "../shared" in node.value
        joined = (
            isinstance(node, ast.BinOp)
            and isinstance(node.right, ast.Constant)
            and str(node.right.value).split("/")[0] == "shared"
            and any(isinstance(part, ast.Attribute) and part.attr.startswith("parent") for part in ast.walk(node.left))
        )
        if whole or joined:
            found.append(node.lineno)
    return found


def test_only_the_helper_says_where_shared_data_lies():
    sources = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("*.py"))}
    assert places(sources[HELPER])
    assert [path.relative_to(ROOT) for path in sources if path not in (HELPER, HERE) and places(sources[path])] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('DATA = Path(__file__).parents[2].parent / "shared" / "data"', [1]),
        ('ROOT = HERE.parent\nDATA = ROOT.parent / "shared/data"', [2]),
        ('data = open("../shared/data/passage.txt")', [1]),
        ('catalog = world.run / "shared"', []),
    ],
)
def test_a_place_named_by_hand_is_found(source, found):
    assert places(source) == found


def test_the_small_public_files_are_in_the_checkout():
    assert len(list(HF_CONFIGS.glob("*_config.json"))) == 24
    assert HF_CONFIGS.is_relative_to(ROOT)
    assert not SHARED.is_relative_to(ROOT)


def test_what_is_absent_skips_by_name():
    skip, reason = needs_shared("no-such-file").args[0], needs_shared("no-such-file").kwargs["reason"]
    assert skip
    assert "../shared/data/no-such-file" in reason
    assert not needs_shared().args[0]


def test_a_parametrisation_that_found_nothing_is_an_error(pytestconfig):
    """Not a test that was skipped, which nobody reads."""
    assert pytestconfig.getini("empty_parameter_set_mark") == "fail_at_collect"
