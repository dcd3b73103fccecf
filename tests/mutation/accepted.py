"""Mutants that no test can tell from the original, each with the reason: accepted.toml beside this file."""

import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.mutation.operators import Mutant

PLACE = Path(__file__).with_name("accepted.toml")


class Accepted(NamedTuple):
    """Told by what is in the source, not by where: every mutant of this change of this line of this scope."""

    file: str
    scope: str
    line: str
    operator: str
    change: str
    reason: str

    def fits(self, mutant: Mutant) -> bool:
        return self[:5] == (mutant.file, mutant.scope, mutant.line, mutant.operator, mutant.change)


class AcceptedError(Exception):
    """An entry without a reason, or one that fits nothing any more."""


def read_accepted(text: str) -> list[Accepted]:
    """The entries of the file. Raises AcceptedError where one says no reason."""
    entries = [Accepted(**entry) for entry in tomllib.loads(text).get("survivor", [])]
    for entry in entries:
        if not entry.reason.strip():
            raise AcceptedError(f"{entry.file}: {entry.change}: accepted without a reason")
    return entries


def check_accepted(entries: Iterable[Accepted], mutants: Sequence[Mutant], killed: Sequence[Mutant]) -> None:
    """Raises AcceptedError where an entry fits none of the files' mutants, or one that is killed."""
    for entry in entries:
        here = f"{PLACE.name}: {entry.file}, {entry.scope}: {entry.change}"
        if not any(entry.fits(mutant) for mutant in mutants):
            raise AcceptedError(f"{here}: the source has no such line or change any more: delete the entry")
        if any(entry.fits(mutant) for mutant in killed):
            raise AcceptedError(f"{here}: a test kills it: delete the entry")


def reason_of(mutant: Mutant, entries: Iterable[Accepted]) -> str | None:
    """Why this one may live; None where nobody says."""
    return next((entry.reason for entry in entries if entry.fits(mutant)), None)
