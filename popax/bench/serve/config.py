"""What the serving benchmark asks, and of whom."""

import dataclasses

from popax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchServeConfig:
    """users: in the catalog, with `lora` adapters of rank `rank` on all linear layers. slots: on the device.
    host_bytes: of rows in the host's memory. zipf: exponent of who asks how often. prompt, output: (least, most)
    tokens, uniform. decode_rounds: of base-only and of distinct users in turns, `decode_tokens` each. trace: requests
    of the Zipf trace, and of the one among resident users. arrivals: requests of each of the two open-loop traces, at
    `load` of what the machine answers; cold: the part of the second one's that users who were never asked for make.
    churn: requests of the last, long trace, with short prompts and outputs."""

    users: int = 1_000
    slots: int = 64
    rank: int = 8
    host_bytes: int = 1 << 28
    zipf: float = 1.1
    prompt: tuple[int, int] = (16, 48)
    output: tuple[int, int] = (16, 64)
    decode_rounds: int = 5
    decode_tokens: int = 48
    trace: int = 600
    arrivals: int = 300
    load: float = 0.5
    cold: float = 0.2
    churn: int = 10_000
    seed: int = 0

    def __post_init__(self):
        for name in ("prompt", "output"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ConfigError(f"BenchServeConfig.{name}={(low, high)}: 1 <= least <= most")
        least = {"slots": 1, "rank": 1, "users": self.slots, "decode_rounds": 1, "decode_tokens": 1, "trace": 1}
        least |= {"arrivals": 10, "churn": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"BenchServeConfig.{name}={getattr(self, name)}: at least {bound}")
        cold_users = round(self.cold * self.arrivals)
        if not (0 < self.load < 1 and 0 < self.cold < 1 and self.users >= self.slots + cold_users):
            raise ConfigError(
                f"BenchServeConfig: load={self.load} and cold={self.cold} are parts of one, and users={self.users} at "
                f"least slots and cold users ({self.slots + cold_users})"
            )
