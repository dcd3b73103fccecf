"""Whole answers and streams of them, for both kinds of completion."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from fastapi import Request, Response

from popax.serving.http.convert import FINISH, Asked, chat_logprobs, completion_logprobs, usage
from popax.serving.http.errors import described
from popax.serving.http.service import Service
from popax.serving.request import Event, Reason, TokenLogps

_LISTEN_S = 0.25  # how often it is asked whether the client is still there


class Choice:
    """One answer as it grows."""

    def __init__(self, prompt: list[int]):
        self.prompt, self.text, self.finish, self.new = prompt, "", None, 0
        self.records: list[TokenLogps] = []

    def take(self, event: Event) -> None:
        self.text += event.text
        self.new += len(event.tokens)
        self.records += [*event.prompt, *event.tokens]
        self.finish = None if event.reason is None else FINISH.get(event.reason)


class Shape:
    """How choices look: in whole answers, and in parts of a stream."""

    def __init__(self, service: Service, *, chat: bool, echo: bool, logprobs: bool):
        self.service, self.chat, self.echo, self.logprobs = service, chat, echo, logprobs

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        base = {"index": index, "finish_reason": choice.finish}
        if self.chat:
            records = chat_logprobs(self.service, choice.records) if self.logprobs else None
            return base | {
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": records,
            }
        before = self.service.tokenizer.decode(choice.prompt) if self.echo else ""
        records = completion_logprobs(self.service, choice.records, 0) if self.logprobs else None
        return base | {"text": before + choice.text, "logprobs": records}

    def part(self, index: int, choice: Choice, event: Event, first: bool) -> dict[str, Any]:
        base = {"index": index, "finish_reason": choice.finish}
        records = [*event.prompt, *event.tokens]
        if self.chat:
            delta = ({"role": "assistant"} if first else {}) | ({"content": event.text} if event.text or first else {})
            logprobs = chat_logprobs(self.service, records) if self.logprobs and records else None
            return base | {"delta": delta, "logprobs": logprobs}
        before = self.service.tokenizer.decode(choice.prompt) if self.echo and first else ""
        offset = len(choice.text) - len(event.text)
        logprobs = completion_logprobs(self.service, records, offset) if self.logprobs and records else None
        return base | {"text": before + event.text, "logprobs": logprobs}


class Failed(Exception):
    """An answer ended in an error of the server's, or of the storage's."""


async def whole_answer(service: Service, asked: Asked, shape: Shape) -> dict[str, Any]:
    """All choices, once they are over. Raises what one of them ended with."""
    choices = _choices(asked)
    async with contextlib.aclosing(service.answers(asked.requests)) as events:
        async for number, event in events:
            check(event)
            choices[number].take(event)
    new = sum(choice.new for choice in choices)
    made = [shape.whole(index, choice) for index, choice in enumerate(choices)]
    return asked.head | {"choices": made, "usage": usage(asked, new)}


async def while_heard(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any] | Response:
    """The work's result; where the client goes away before, the work is cancelled, and with it what the engine does."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=_LISTEN_S))[0]:
            if await request.is_disconnected():
                return Response(status_code=499)  # nobody reads it
        return task.result()
    finally:
        task.cancel()


async def streamed(
    service: Service, asked: Asked, shape: Shape, *, with_usage: bool, first: tuple[int, Event], rest: AsyncIterator
) -> AsyncIterator[str]:
    """Server-sent events, a part for each event of the engine. first: the event that came before the status was sent,
    so that what is refused has a status of its own."""
    choices, begun = _choices(asked), set()
    kind = "chat.completion.chunk" if shape.chat else asked.head["object"]
    head = asked.head | {"object": kind} | ({"usage": None} if with_usage else {})
    line: Callable[[Any], str] = lambda value: f"data: {json.dumps(value, separators=(',', ':'))}\n\n"  # noqa: E731
    try:
        async for number, event in _again(first, rest):
            if event.error is not None:
                yield line(described(event.error)[1])
                return
            choices[number].take(event)
            yield line(head | {"choices": [shape.part(number, choices[number], event, number not in begun)]})
            begun.add(number)
        if with_usage:
            yield line(head | {"choices": [], "usage": usage(asked, sum(choice.new for choice in choices))})
        yield "data: [DONE]\n\n"
    finally:
        await rest.aclose()  # pyright: ignore[reportAttributeAccessIssue]


async def _again(first: tuple[int, Event], rest: AsyncIterator) -> AsyncIterator[tuple[int, Event]]:
    yield first
    async for each in rest:
        yield each


def check(event: Event) -> None:
    """Raises what an answer ended with, where that is an error; a stream's first event still has a status."""
    if event.error is not None:
        raise event.error
    if event.reason is Reason.ERROR:
        raise Failed("an answer ended in an error")


def _choices(asked: Asked) -> list[Choice]:
    n = len(asked.requests) // len(asked.prompts)
    return [Choice(prompt) for prompt in asked.prompts for _ in range(n)]
