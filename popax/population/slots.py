"""Who sits in which slot, and who is next. Plain host data: a pure function of what was admitted and released."""

import dataclasses
from collections.abc import Sequence

from popax.errors import PopulationError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotTable:
    """users[i] sits in slot i (None: unused); `next` indexes the queue.

    The table is immutable: every change is a new one, so a checkpoint can hold it and a resumed run repeats it.
    """

    users: tuple[str | None, ...]
    next: int

    @classmethod
    def empty(cls, slots: int) -> "SlotTable":
        if slots < 1:
            raise PopulationError(f"slots={slots}: a population needs at least one")
        return cls(users=(None,) * slots, next=0)

    @property
    def occupied(self) -> list[int]:
        return [slot for slot, user in enumerate(self.users) if user is not None]

    def release(self, slots: Sequence[int]) -> "SlotTable":
        """The same table with these slots unused."""
        gone = set(slots)
        return dataclasses.replace(
            self, users=tuple(None if slot in gone else user for slot, user in enumerate(self.users))
        )

    def admit(
        self, queue: Sequence[str], slots: Sequence[int] | None = None
    ) -> tuple["SlotTable", list[tuple[int, str]]]:
        """Seat the queue's next users in those of the slots (default: all) that are unused, in order; returns the table
        and the (slot, user) pairs."""
        users, index, seated = list(self.users), self.next, []
        for slot in range(len(users)) if slots is None else slots:
            if users[slot] is None and index < len(queue):
                users[slot] = queue[index]
                seated.append((slot, queue[index]))
                index += 1
        return SlotTable(users=tuple(users), next=index), seated
