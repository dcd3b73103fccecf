"""What the nightly benchmark runs."""

import dataclasses

from popax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class NightlyConfig:
    """nights: the text of `users` users, cut by time into so many parts of equal size; the second is killed on the way.

    steps, rank, slots: of each user's training, a night. base_steps: of the base that is pretrained on the other users.
    scale_users, of whom scale_news have written something: the population that a night without much news is timed on;
    scale_messages: how many each of them has.
    """

    nights: int = 3
    users: int = 32
    steps: int = 60
    rank: int = 8
    slots: int = 16
    base_steps: int = 400
    scale_users: int = 100_000
    scale_news: int = 100
    scale_messages: int = 3

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ConfigError(f"NightlyConfig.{field.name}={getattr(self, field.name)}: at least 1")
        if self.nights < 2:
            raise ConfigError(f"NightlyConfig.nights={self.nights}: at least 2, of which the second is killed")
        if self.scale_news > self.scale_users:
            raise ConfigError(f"scale_news={self.scale_news} of scale_users={self.scale_users}: not more than all")
