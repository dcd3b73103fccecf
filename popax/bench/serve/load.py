"""The load: who asks what and when, and what became of it."""

import concurrent.futures
import threading
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from popax.serving.engine import Engine
from popax.serving.names import Names
from popax.serving.request import Event, GenerationRequest, Reason


class Wish(NamedTuple):
    """One request to come: a user's name or "base", a prompt's tokens, how many new ones. tag: of whose it is."""

    model: str
    prompt: tuple[int, ...]
    new: int
    tag: str = ""


class Done(NamedTuple):
    """What became of a wish: seconds to its first token, and in all; tokens; whether it ended as it should."""

    tag: str
    first_s: float
    whole_s: float
    tokens: int
    well: bool


def wishes(
    models: Sequence[str], prompt: tuple[int, int], output: tuple[int, int], rng: np.random.Generator, tag: str = ""
) -> list[Wish]:
    """One for each model, with prompts and outputs of uniform lengths; no two prompts share a beginning."""
    lengths = rng.integers(prompt[0], prompt[1] + 1, len(models))
    news = rng.integers(output[0], output[1] + 1, len(models))
    return [
        Wish(model, tuple(rng.integers(0, 256, length).tolist()), int(new), tag)
        for model, length, new in zip(models, lengths, news, strict=True)
    ]


def zipf_users(count: int, users: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Numbers 0..users-1, number k with a probability in proportion to (k+1)^-exponent."""
    weights = np.arange(1, users + 1, dtype=np.float64) ** -exponent
    return rng.choice(users, size=count, p=weights / weights.sum())


class Client:
    """Asks an engine, names looked up as a server does for each request."""

    def __init__(self, engine: Engine, names: Names):
        self._engine, self._names = engine, names

    def closed(self, wanted: Iterable[Wish], in_flight: int) -> list[Done]:
        """So many at once, the next one when one ends."""
        room, futures = threading.Semaphore(in_flight), []
        for wish in wanted:
            room.acquire()
            futures.append(self._ask(wish, time.monotonic(), room))
        return [future.result() for future in futures]

    def at_once(self, wanted: Sequence[Wish]) -> list[Done]:
        """All of them in the engine's hands before it takes a step."""
        gate = threading.Event()
        self._engine.call(gate.wait)
        futures = [self._ask(wish, time.monotonic()) for wish in wanted]
        gate.set()
        return [future.result() for future in futures]

    def open(self, wanted: Sequence[Wish], rate: float, rng: np.random.Generator) -> list[Done]:
        """Poisson arrivals, `rate` a second, whether earlier ones are answered or not. Times count from when a request
        was due."""
        due, futures = time.monotonic(), []
        for wish in wanted:
            due += rng.exponential(1 / rate)
            time.sleep(max(0.0, due - time.monotonic()))
            futures.append(self._ask(wish, due))
        return [future.result() for future in futures]

    def _ask(self, wish: Wish, due: float, room: threading.Semaphore | None = None) -> concurrent.futures.Future[Done]:
        done: concurrent.futures.Future[Done] = concurrent.futures.Future()
        seen = {"first": 0.0, "tokens": 0}

        def told(event: Event) -> None:
            if event.tokens and not seen["tokens"]:
                seen["first"] = event.time
            seen["tokens"] += len(event.tokens)
            if event.reason is not None:
                well = event.reason is Reason.LENGTH and seen["tokens"] == wish.new
                done.set_result(Done(wish.tag, seen["first"] - due, event.time - due, int(seen["tokens"]), well))
                if room is not None:
                    room.release()

        terms = self._names.find("", wish.model).terms
        self._engine.submit(GenerationRequest(tokens=wish.prompt, terms=terms, max_new_tokens=wish.new), told)
        return done
