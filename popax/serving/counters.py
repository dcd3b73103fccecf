"""What the engine did, counted."""

import dataclasses
from typing import NamedTuple

from popax.serving.pages import PageCounters


@dataclasses.dataclass
class EngineCounters:
    """steps, and what they did: tokens of prompts that were computed, new tokens, seconds in steps. requests: that were
    taken; ended: by reason."""

    steps: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    step_s: float = 0.0
    requests: int = 0
    ended: dict[str, int] = dataclasses.field(default_factory=dict)


class EngineState(NamedTuple):
    """A moment's copy."""

    counters: EngineCounters
    pages: PageCounters
    pages_held: int
    pages_available: int
    pages_total: int
    running: int
    waiting: int
    preempted: int
