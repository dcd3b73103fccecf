"""Tests whose whole size takes longer than CI has: CI runs their smallest form, `make accept-ROOM` the whole one."""

import os

# Set by `python -m tests.acceptance`.
WHOLE = "POPAX_WHOLE"


def whole() -> bool:
    return WHOLE in os.environ


def size(in_ci: int, *, whole_size: int) -> int:
    """The number that a test goes by."""
    return whole_size if whole() else in_ci
