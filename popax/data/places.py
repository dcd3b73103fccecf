"""Where examples were read from, and which users were left out because of what stood there."""

import bisect
import dataclasses
import json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refused:
    """Why a user is left out, and the record that it is about: its file and its number there, from 1."""

    reason: str
    file: str
    record: int


class Places:
    """index -> (file, number): one entry where a file begins, and one wherever its records do not follow each other."""

    def __init__(self, entries: list[tuple[int, str, int]] | None = None):
        self._entries = entries or []

    def add(self, index: int, file: str, number: int) -> None:
        """The place of the next example; indices come in ascending order."""
        if self._entries:
            first, last_file, began = self._entries[-1]
            if file == last_file and number - began == index - first:
                return
        self._entries.append((index, file, number))

    def of(self, index: int) -> tuple[str | None, int]:
        """The file and the number; (None, index + 1) where no place is known."""
        at = bisect.bisect_right(self._entries, index, key=lambda entry: entry[0]) - 1
        if at < 0:
            return None, index + 1
        first, file, number = self._entries[at]
        return file, number + index - first

    def to_json(self) -> str:
        """`from_json` reads it back."""
        return json.dumps(self._entries)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Places":
        return cls([(index, file, number) for index, file, number in json.loads(text)])
