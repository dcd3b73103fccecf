"""Which rows of a catalog are named by a manifest, and which by none: one bit a row."""

from collections.abc import Iterator

import numpy as np

from popax.store.bases import named_basis
from popax.store.database import Database, storage_errors
from popax.store.manifest import Manifest
from popax.store.reader import keys_under
from popax.store.records import next_row_key, rows_path, unseal

_LEAST = 1024


class RowCensus:
    """Collects the rows that manifests name, then finds those that none does.

    Rows that are written after the census began are not its concern: their manifests may come after it, too.
    """

    def __init__(self, database: Database):
        self._database = database
        self._named: dict[tuple[int, str], np.ndarray] = {}
        self._limits = {
            (shard, cohort): _next_row(database, shard, cohort)
            for shard in range(database.shard_count())
            for cohort in _cohorts(database, shard)
        }

    def name(self, manifest: Manifest) -> bool:
        """Note the revision's row and its optimizer's; False where another revision has named one of them before."""
        first = self._note((manifest.shard, manifest.array), manifest.row)
        if manifest.optimizer is not None:
            first &= self._note((manifest.shard, manifest.optimizer_array), manifest.optimizer["row"])
        if (basis := named_basis(manifest)) is not None:  # of many revisions at once
            self._note((0, basis[0]), basis[1])
        return first

    def _note(self, place: tuple[int, str], row: int) -> bool:
        bits = self._named.get(place, np.zeros(0, bool))
        if row >= len(bits):
            longer = np.zeros(max(_LEAST, 2 * len(bits), row + 1, self._limits.get(place, 0)), bool)
            longer[: len(bits)] = bits
            bits = self._named[place] = longer
        first = not bits[row]
        bits[row] = True
        return bool(first)

    def unnamed(self) -> Iterator[tuple[int, str, int]]:
        """(shard, cohort, row) of each row that is there, was before the census began, and was not named."""
        for (shard, cohort), limit in self._limits.items():
            bits = self._named.get((shard, cohort), np.zeros(0, bool))
            for row in _rows(self._database, shard, cohort):
                if row < limit and not (row < len(bits) and bits[row]):
                    yield shard, cohort, row

    def orphans(self) -> int:
        """How many `unnamed` there are."""
        return sum(1 for _ in self.unnamed())


def _cohorts(database: Database, shard: int) -> list[str]:
    prefix = next_row_key("")
    return [key.removeprefix(prefix) for key in keys_under(database.shard(shard), database.place, prefix)]


def _next_row(database: Database, shard: int, cohort: str) -> int:
    with storage_errors(database.place):
        return unseal(database.shard(shard).read(next_row_key(cohort)).result().value)["next"]


def _rows(database: Database, shard: int, cohort: str) -> Iterator[int]:
    """The indices of the rows that are there; listed by their first two digits, so that few are in memory at once."""
    head = f"{rows_path(cohort)}c/"
    for digits in (*(f"{digit}/" for digit in range(10)), *map(str, range(10, 100))):
        for key in keys_under(database.shard(shard), database.place, head + digits):
            yield int(key[len(head) :].partition("/")[0])
