"""python -m tests.acceptance ROOM: a room's tests at their whole size, which CI has no time for.

A test is a cell. What a cell gave is in docs/acceptance/ROOM.json as soon as it has ended; the command again runs only
the cells that have not passed at this commit, so that it may be interrupted. Commit the file from a clean tree.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from popax.atomic import write_text
from popax.bench.report import versions
from tests.cpu_times import cpu_seconds
from tests.sizes import WHOLE

ROOT = Path(__file__).parents[2]
CHANGED = "+changed"
ROOMS = Path(__file__).with_name("rooms.toml")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 where every cell has passed, 1 where one has not, 2 where nothing can be run."""
    rooms = tomllib.loads(ROOMS.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(prog="python -m tests.acceptance", description=__doc__.partition("\n")[0])
    parser.add_argument("room", choices=sorted(rooms))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "acceptance", help="where ROOM.json is")
    parser.add_argument("--list", action="store_true", help="the cells, and which have passed at this commit")
    options = parser.parse_args(argv)
    place = options.out / f"{options.room}.json"
    cells = cells_of(rooms[options.room]["tests"])
    if not cells:
        print(f"{options.room}: pytest finds none of its tests", file=sys.stderr)
        return 2
    found, now = read_cells(place), commit_of(options.out)
    left = [cell for cell in cells if not has_passed(found.get(cell), now)]
    if options.list:
        for cell in cells:
            print("passed" if cell not in left else "to run", cell)
        return 0
    for number, cell in enumerate(left):
        print(f"{number + 1} of {len(left)}: {cell}", flush=True)
        found[cell] = run_cell(cell) | {"commit": now}
        print(f"  {found[cell]['outcome']}, {found[cell]['seconds']:.0f} s", flush=True)
        write_cells(place, {name: found[name] for name in cells if name in found})
    passed = sum(found[cell]["outcome"] == "passed" for cell in cells)
    print(f"{passed} of {len(cells)} passed: {place}")
    return int(passed < len(cells))


def cells_of(tests: Sequence[str]) -> list[str]:
    """The tests that pytest collects, by name; parametrised ones each."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *tests]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {WHOLE: "1"}, capture_output=True, text=True)
    if done.returncode not in (0, 5):
        raise SystemExit(done.stdout + done.stderr)
    return [line for line in done.stdout.splitlines() if "::" in line and not line.startswith(" ")]


def run_cell(cell: str) -> dict[str, Any]:
    """The test in a process of its own, its output on this one's."""
    began, before = time.monotonic(), cpu_seconds()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cell]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {WHOLE: "1"}, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-8000:], done.stderr[-2000:], sep="\n")
    # A skipped test has not been accepted.
    passed = done.returncode == 0 and " passed" in done.stdout.splitlines()[-1]
    return {
        "outcome": "passed" if passed else "failed" if done.returncode else "skipped",
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(cpu_seconds() - before, 1),
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": versions(),
    }


def commit_of(out: Path) -> str:
    """The checkout's commit, `+changed` where tracked files differ from it, those in `out` left aside."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    outside = [] if not out.resolve().is_relative_to(ROOT) else [f":!{out.resolve().relative_to(ROOT)}"]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *outside)
    return git("rev-parse", "--short=12", "HEAD") + (CHANGED if changed else "")


def has_passed(cell: dict[str, Any] | None, now: str) -> bool:
    """Whether it has, of exactly this commit: of a tree with changes nobody knows which."""
    return cell is not None and cell["outcome"] == "passed" and cell["commit"] == now and not now.endswith(CHANGED)


def read_cells(place: Path) -> dict[str, dict[str, Any]]:
    return json.loads(place.read_text(encoding="utf-8"))["cells"] if place.exists() else {}


def write_cells(place: Path, cells: dict[str, dict[str, Any]]) -> None:
    write_text(place, json.dumps({"room": place.stem, "cells": cells}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
