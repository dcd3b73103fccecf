"""Which mutants are tried: as many as are asked for, drawn by a seed."""

import hashlib
import itertools
from collections.abc import Iterable, Sequence

from tests.mutation.operators import Mutant


def draw(mutants: Iterable[Mutant], count: int, seed: int) -> list[Mutant]:
    """`count` of the mutants, all where there are not so many: by turns over the files, in a file over the operators.

    Whose turn is the same is decided by a digest of what the mutant changes. So a draw depends on the seed and the
    sources alone, and an edit of one line exchanges little of it: no number of a line is in the digest.
    """
    by_file: dict[str, dict[str, list[Mutant]]] = {}
    for mutant in mutants:
        by_file.setdefault(mutant.file, {}).setdefault(mutant.operator, []).append(mutant)
    turns = [
        _by_turns([sorted(of_operator[name], key=lambda one: _rank(one, seed)) for name in sorted(of_operator)])
        for _, of_operator in sorted(by_file.items())
    ]
    drawn = _by_turns(turns)[:count]
    return sorted(drawn, key=lambda one: (one.file, one.number, one.key))


def _rank(mutant: Mutant, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}|{mutant.key}".encode()).digest()


def _by_turns(lists: Sequence[Sequence[Mutant]]) -> list[Mutant]:
    """The first of each, then the second of each, ..."""
    rounds = itertools.zip_longest(*lists)
    return [mutant for one in rounds for mutant in one if mutant is not None]
