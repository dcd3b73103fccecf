"""Users whom a run leaves as they are: whose text or revision cannot be used, and those with nothing to learn from."""

import dataclasses
from typing import Any

from popax.errors import (
    BaseMismatchError,
    CorruptRevisionError,
    DataError,
    PopaxError,
    PopulationError,
    RevisionNotFoundError,
    SignatureError,
    TokenizerError,
    UserTextError,
)

NOTHING_TO_LEARN = "none of the user's examples gives a target with loss in the past"
# What is wrong with one user's own text or revision. Anything else (a full disk, a broken catalog) is the run's.
OF_ONE_USER = (
    BaseMismatchError,
    CorruptRevisionError,
    DataError,
    PopulationError,
    RevisionNotFoundError,
    SignatureError,
    TokenizerError,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetAside:
    """A user who was not trained, and why. record, file: the place of the record that is at fault, where it is one.

    faulty: False for a user who merely has nothing to learn from.
    """

    user: str
    reason: str
    record: int | None = None
    file: str | None = None
    faulty: bool = True

    @classmethod
    def of(cls, user: str, error: PopaxError) -> "SetAside":
        """Because of one of OF_ONE_USER."""
        place = {"record": error.record, "file": error.file} if isinstance(error, UserTextError) else {}
        return cls(user=user, reason=" ".join(str(error).split()), **place)

    @classmethod
    def idle(cls, user: str) -> "SetAside":
        """Because there is nothing to learn from."""
        return cls(user=user, reason=NOTHING_TO_LEARN, faulty=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: `SetAside(**record)` reads them back."""
        return dataclasses.asdict(self)
