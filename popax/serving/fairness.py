"""Whose turn it is: the virtual token counter of arXiv 2401.00588 (as S-LoRA's), over tenants.

A tenant's counter grows with the tokens it is served, a generated one counting more than one of a prompt. The waiting
tenant with the smallest counter is next. One who comes back from a pause starts no lower than the least of those who
are waiting: what was not asked for is not saved up.
"""

PROMPT_TOKEN, NEW_TOKEN = 1.0, 2.0


class TenantCounters:
    """Not safe between threads: the engine's own has it."""

    def __init__(self):
        self._served: dict[str, float] = {}
        self._waiting: dict[str, int] = {}

    def wait(self, tenant: str) -> None:
        """One more request of this tenant waits."""
        if not self._waiting.get(tenant):
            floor = min((self._served[other] for other, count in self._waiting.items() if count), default=0.0)
            if not any(self._waiting.values()):  # nobody waits: the last who did is the measure
                floor = min(self._served.values(), default=0.0)
            self._served[tenant] = max(self._served.get(tenant, 0.0), floor)
        self._waiting[tenant] = self._waiting.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        """One request of this tenant waits no more."""
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant]

    def serve(self, tenant: str, *, prompt: int = 0, new: int = 0) -> None:
        """Count tokens that were computed for this tenant."""
        self._served[tenant] = self._served.get(tenant, 0.0) + PROMPT_TOKEN * prompt + NEW_TOKEN * new

    def turns(self) -> list[str]:
        """The tenants with waiting requests, who was served least first."""
        return sorted(self._waiting, key=lambda tenant: (self._served[tenant], tenant))

    def waiting(self, tenant: str) -> int:
        """How many requests of this tenant wait."""
        return self._waiting.get(tenant, 0)
