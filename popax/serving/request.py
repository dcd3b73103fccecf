"""What the engine is asked for, what it tells while it works, and what it knows of an answer under way."""

import concurrent.futures
import dataclasses
import enum
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from popax.serving.detokenize import TextStream
from popax.serving.sampling import Sampling
from popax.store.manifest import Manifest


class Term(NamedTuple):
    """One adapter of a sum, and its weight in it."""

    manifest: Manifest
    weight: float = 1.0


class Reason(enum.StrEnum):
    """Why an answer ended. `stop`: the end token or a stop text; `length`: as many tokens as were asked for, or as the
    context holds."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


class TokenLogps(NamedTuple):
    """A token, log p of it, and the likeliest ones at its place with theirs. None: not asked for, or no context."""

    token: int
    logp: float | None
    top: tuple[tuple[int, float], ...] = ()


class Event(NamedTuple):
    """text: what has become certain. tokens: those of this event. reason: set in the last event, and only there; error:
    what it ended with. prompt: records of the prompt's tokens, in the first event of a request that wants them. time:
    when it was told, on time.monotonic's clock."""

    text: str = ""
    tokens: tuple[TokenLogps, ...] = ()
    reason: Reason | None = None
    error: BaseException | None = None
    prompt: tuple[TokenLogps, ...] = ()
    time: float = 0.0


class Constraint(Protocol):
    """Which tokens may come next: structured output. `allowed` fills a bit a token (uint32 words)."""

    def allowed(self, words_W: np.ndarray) -> None: ...

    def accept(self, token: int) -> None: ...

    @property
    def ended(self) -> bool: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """tokens: the prompt, at least one. terms: () for the base alone. ends: token ids that end the answer. top: how
    many alternatives a token's record lists, None for no records. prompt_logps: also of the prompt. priority: higher
    goes first within a tenant. deadline: on time.monotonic's clock. bias: added to a token's logit."""

    tokens: tuple[int, ...]
    tenant: str = ""
    terms: tuple[Term, ...] = ()
    max_new_tokens: int = 16
    sampling: Sampling = Sampling()  # noqa: RUF009 - frozen
    seed: int = 0
    stops: tuple[str, ...] = ()
    ends: frozenset[int] = frozenset()
    top: int | None = None
    prompt_logps: bool = False
    priority: int = 0
    deadline: float | None = None
    bias: tuple[tuple[int, float], ...] = ()
    constraint: Constraint | None = None


class Timing(NamedTuple):
    """Seconds on time.monotonic's clock; 0 for what has not happened."""

    arrived: float
    admitted: float = 0.0
    first: float = 0.0
    ended: float = 0.0


@dataclasses.dataclass(eq=False)
class Answer:
    """One answer under way: the engine's thread alone writes it, once it was handed over.

    ahead: virtual tokens before the prompt (popax.modeling.virtual). tokens: these, the prompt's and the new ones.
    computed: of how many of them keys and values are in its pages. digests: of its full pages, as far as they are
    named. loading: its adapters' rows, or promises of them; None before they were asked for, and after they came into
    slots. hold: these slots, while it has them. blocked_since: when pages or slots were first not free.
    """

    request: GenerationRequest
    tell: Callable[[Event], None]
    stream: TextStream
    scope: bytes
    ahead: tuple[int, ...] = ()
    number: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    digests: list[bytes] = dataclasses.field(default_factory=list)
    loading: Sequence[np.ndarray | concurrent.futures.Future] | None = ()
    hold: Any = None
    cancelled: bool = False
    timing: Timing = Timing(0.0)  # noqa: RUF009 - immutable
    blocked_since: float = 0.0
    prompt_records: list[TokenLogps] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = [*self.ahead, *self.request.tokens]
        self.timing = Timing(time.monotonic())

    @property
    def ready(self) -> bool:
        """Whether its adapters' rows are at hand (or what kept them from being read)."""
        if self.loading is None:
            return False
        return all(not isinstance(row, concurrent.futures.Future) or row.done() for row in self.loading)

    @property
    def prompt(self) -> int:
        """Tokens of the prompt, the virtual ones with them."""
        return len(self.ahead) + len(self.request.tokens)

    @property
    def made(self) -> int:
        """New tokens so far."""
        return len(self.tokens) - self.prompt

    @property
    def left(self) -> int:
        """Tokens that have no keys and values yet; 1 where only the newest has none, which is what decoding is."""
        return len(self.tokens) - self.computed

    @property
    def decodes(self) -> bool:
        return self.left == 1 and self.computed > 0

    def pages_for(self, tokens: int, size: int) -> int:
        """How many pages it lacks for so many tokens in all."""
        return max(0, -(-tokens // size) - len(self.pages))
