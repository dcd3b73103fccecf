"""Between the event loop, where requests come and go, and the engine's thread: names, answers, and who is told."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from popax.data.tokenize import Tokenizer
from popax.serving.engine import Engine
from popax.serving.http.metrics import Metrics
from popax.serving.names import Named, Names
from popax.serving.request import Answer, Event, GenerationRequest
from popax.serving.structured import Grammars
from popax.store.catalog import Catalog
from popax.store.pointers import PROMOTED, Which

LOOKUPS = 8


class Service:
    """What every endpoint needs. One for each server."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, catalog: Catalog | None, *, default: Which = PROMOTED, name: str
    ):
        """name: the base's, as /v1/models lists it beside `base`."""
        self.engine, self.tokenizer, self.catalog, self.name = engine, tokenizer, catalog, name
        self.names = Names(catalog, engine.base.digest, default)
        self.metrics = Metrics(engine)
        self.draining = False
        self._lookups = ThreadPoolExecutor(LOOKUPS, thread_name_prefix="popax-lookup")

    async def off_loop(self, work, *args: Any) -> Any:
        """Run what waits for storage on a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._lookups, work, *args)

    async def find(self, tenant: str, name: str) -> Named:
        """`Names.find`, off the loop."""
        return await self.off_loop(self.names.find, tenant, name)

    async def answers(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[tuple[int, Event]]:
        """(number of the request, event) of all of them as they come, until each has had its last.

        Whoever stops listening cancels those that are not over. Raises what `Engine.submit` does; none of them is then
        answered.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def teller(number: int):
            return lambda event: loop.call_soon_threadsafe(events.put_nowait, (number, event))

        answers: list[Answer] = []
        open_ones = set(range(len(requests)))
        try:
            for number, request in enumerate(requests):
                answers.append(await self.off_loop(self.engine.submit, request, teller(number)))
                self.metrics.asked(request)
            while open_ones:
                number, event = await events.get()
                self.metrics.told(answers[number], event)
                if event.reason is not None:
                    open_ones.discard(number)
                yield number, event
        finally:
            for number in open_ones & set(range(len(answers))):
                self.engine.cancel(answers[number])

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Made when the first answer is to be structured."""
        return Grammars(self.tokenizer, self.engine.base.model.config.vocab_size)

    def close(self) -> None:
        """End the threads for look-ups."""
        with contextlib.suppress(RuntimeError):
            self._lookups.shutdown(wait=False, cancel_futures=True)
