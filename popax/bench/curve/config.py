"""What a curve is made of."""

import dataclasses

from popax.adapters.base import AdapterConfig
from popax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurveConfig:
    """The same users with each of these adapters, every user `seeds` times and with each of the rates.

    users: so many of the data's. rates: factors on each method's own learning rate. seeds and rates are members of one
    population, not runs of their own. A seed is another start and another order of a user's text.
    """

    adapters: tuple[AdapterConfig, ...] = (AdapterConfig(),)
    users: int = 12
    seeds: int = 3
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)

    def __post_init__(self):
        object.__setattr__(self, "adapters", tuple(self.adapters))
        object.__setattr__(self, "rates", tuple(self.rates))
        if self.users < 2 or self.seeds < 1:
            raise ConfigError(f"users={self.users}, seeds={self.seeds}: at least 2 users and 1 seed")
        if not self.adapters or not self.rates or min(self.rates) <= 0:
            raise ConfigError(f"rates={self.rates}, {len(self.adapters)} adapters: one at least of each, rates above 0")

    @property
    def members(self) -> int:
        return self.users * self.seeds * len(self.rates)


def name_of(adapter: AdapterConfig) -> str:
    """A short name: the method, a start that is not the default, the rank, and options."""
    start = "" if adapter.init == "default" else f"/{adapter.init}"
    options = "".join(f" {name}={value}" for name, value in adapter.options)
    return f"{adapter.method}{start} r{adapter.rank}{options}"
