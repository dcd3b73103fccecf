"""python -m tests.mutation: do the tests see a mistake in the files that decide?

Draws mutants (one small change each) of the files in sources.py, runs each against the tests that belong to its file,
and lists those that no test saw. Fails where fewer than 95% are killed, or where one lives without a reason in
accepted.toml.
"""

import argparse
import collections
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.mutation.accepted import PLACE, Accepted, AcceptedError, check_accepted, read_accepted, reason_of
from tests.mutation.draw import draw
from tests.mutation.operators import Mutant, mutants_of
from tests.mutation.run import Job, Outcome, TestsError, outcomes, warm_up
from tests.mutation.sources import SOURCES

ROOT = Path(__file__).parents[2]
LEAST = 0.95
SHOWN = 110


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 where the tests see enough, 1 where they do not, 2 where nothing can be said."""
    options = _options(argv)
    files = [file for file in SOURCES if options.file is None or file.endswith(options.file)]
    if not files:
        print(f"--file {options.file}: none of {', '.join(SOURCES)}", file=sys.stderr)
        return 2
    accepted = [entry for entry in read_accepted(PLACE.read_text(encoding="utf-8")) if entry.file in files]
    every = [mutant for file in files for mutant in mutants_of(file, (ROOT / file).read_text(encoding="utf-8"))]
    start = time.monotonic()
    try:
        check_accepted(accepted, every, [])
        drawn = draw(every, options.count, options.seed)
        warm_up([*map(module_of, files), *(module_of(test) for file in files for test in SOURCES[file])])
        found = _tried(drawn, _times(files, options.workers), options.workers)
        check_accepted(accepted, every, [mutant for mutant, outcome in found if outcome.killed])
    except (AcceptedError, TestsError) as error:
        print(error, file=sys.stderr)
        return 2
    return _report(found, accepted, len(every), options.seed, time.monotonic() - start, as_json=options.json)


def module_of(file: str) -> str:
    """a/b.py and a/b.py::test as a.b."""
    return file.partition("::")[0].removesuffix(".py").replace("/", ".")


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=120, help="how many mutants (120)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (0)")
    parser.add_argument("--file", help="only this source, or those whose path ends so")
    parser.add_argument("--workers", type=int, default=2, help="processes at once (2)")
    parser.add_argument("--json", action="store_true", help="every mutant and its outcome, as JSON")
    return parser.parse_args(argv)


def _times(files: Sequence[str], workers: int) -> dict[str, float]:
    """What each file's tests take without a mutation. Raises TestsError where they fail."""
    jobs = [Job(module_of(file), ROOT / file, None, SOURCES[file]) for file in files]
    found = {files[index]: outcome for index, outcome in outcomes(jobs, workers)}
    for file, outcome in found.items():
        if outcome.killed:
            raise TestsError(f"{file}: its tests fail without a mutation: {outcome.by}")
    return {file: outcome.seconds for file, outcome in found.items()}


def _tried(drawn: Sequence[Mutant], times: Mapping[str, float], workers: int) -> list[tuple[Mutant, Outcome]]:
    jobs = [Job(module_of(one.file), ROOT / one.file, one.make, SOURCES[one.file], times[one.file]) for one in drawn]
    ended = dict(outcomes(jobs, workers))
    return [(mutant, ended[index]) for index, mutant in enumerate(drawn)]


def _report(
    found: Sequence[tuple[Mutant, Outcome]],
    accepted: Sequence[Accepted],
    total: int,
    seed: int,
    seconds: float,
    *,
    as_json: bool,
) -> int:
    survivors = [(mutant, reason_of(mutant, accepted)) for mutant, outcome in found if not outcome.killed]
    rate = 1.0 - len(survivors) / max(len(found), 1)
    passed = rate >= LEAST and all(reason for _, reason in survivors)
    if as_json:
        mutants = [
            {**mutant._asdict(), "change": mutant.change, **outcome._asdict(), "reason": reason_of(mutant, accepted)}
            for mutant, outcome in found
        ]
        plain = [{name: value for name, value in one.items() if name != "make"} for one in mutants]
        summary = {"seed": seed, "of": total, "rate": rate, "seconds": seconds, "passed": passed, "mutants": plain}
        print(json.dumps(summary, indent=1))
        return 0 if passed else 1
    _print_table(found)
    for mutant, reason in survivors:
        print(f"\n{mutant.file}:{mutant.number} ({mutant.scope}), {mutant.operator}: {mutant.change}")
        print(f"  {mutant.line}\n  {reason or 'lives without a reason: mend the tests, or say why in accepted.toml'}")
    print(
        f"\n{len(found)} of {total} mutants (seed {seed}): {len(found) - len(survivors)} killed, {rate:.1%} (at least "
        f"{LEAST:.0%}); {len(survivors)} live, {sum(not reason for _, reason in survivors)} of them without a reason; "
        f"{seconds:.0f} s, {sum(outcome.seconds for _, outcome in found):.0f} s of the processor"
    )
    return 0 if passed else 1


def _print_table(found: Sequence[tuple[Mutant, Outcome]]) -> None:
    for mutant, outcome in found:
        end = f"{outcome.seconds:5.1f} s  {outcome.by.rpartition('::')[2] if outcome.killed else 'LIVES'}"
        print(f"{mutant.file}:{mutant.number:<4} {mutant.operator:18} {mutant.change[:SHOWN]:{SHOWN}} {end}")
    print(f"\n{'':40}" + "killed of")
    for name in ("file", "operator"):
        tried = collections.Counter(getattr(mutant, name) for mutant, _ in found)
        killed = collections.Counter(getattr(mutant, name) for mutant, outcome in found if outcome.killed)
        for one in sorted(tried):
            print(f"{one:40}{killed[one]:6} {tried[one]:2}")


if __name__ == "__main__":
    sys.exit(main())
