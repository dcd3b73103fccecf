"""A tokenizer's chat template: the text of a conversation, and where in it the assistant speaks.

The variables and functions a template may use are those of Hugging Face tokenizers' `apply_chat_template`.
"""

import datetime
import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from popax.errors import TokenizerError

# Noncharacters: they mark a {% generation %} block in the rendered text, and no valid template writes them.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_PROBES = ("\ufdd2", "\ufdd3")


class Rendered(NamedTuple):
    """text, and the (start, end) character spans that the assistant wrote, end-of-turn token included."""

    text: str
    assistant_spans: tuple[tuple[int, int], ...]


class ChatTemplate:
    """A jinja template in a sandbox; `special_tokens` are the texts that end a turn."""

    def __init__(self, source: str, variables: Mapping[str, str], special_tokens: tuple[str, ...]):
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise_exception)
        self._variables, self._special_tokens = dict(variables), special_tokens
        self._marks_generation = "endgeneration" in source
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TokenizerError(f"the chat template does not parse: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        now: datetime.datetime | None = None,
    ) -> Rendered:
        """The conversation's text; `now` is what strftime_now shows, by default the clock.

        Raises TokenizerError with the template's own words where it refuses the messages.
        """
        messages = [dict(message) for message in messages]
        write = functools.partial(self._text, (now or datetime.datetime.now()).strftime)
        text = write(messages, add_generation_prompt)
        if self._marks_generation:
            return _unmark(text)
        spans = [
            self._assistant_span(write, messages, index, text)
            for index, message in enumerate(messages)
            if message.get("role") == "assistant"
        ]
        return Rendered(text, tuple(spans))

    def _text(self, strftime_now: Callable, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                strftime_now=strftime_now,
                tools=None,
                **self._variables,
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            roles = [message.get("role") for message in messages]
            raise TokenizerError(f"the chat template refuses messages with roles {roles}: {error}") from error

    def _assistant_span(
        self, write: Callable[..., str], messages: list[dict[str, Any]], index: int, text: str
    ) -> tuple[int, int]:
        """What assistant turn `index` adds to the prompt that asks for it."""
        until = write(messages[: index + 1], False)
        if not text.startswith(until):
            # The template writes earlier turns differently (drops their reasoning, for instance).
            return self._content_span(write, messages, index, text)
        prompt = write(messages[:index], True) if index else ""
        start = len(_common_prefix(prompt, until))
        return start, self._trim(text, start, len(until))

    def _content_span(
        self, write: Callable[..., str], messages: list[dict[str, Any]], index: int, text: str
    ) -> tuple[int, int]:
        """Where the turn's content stands: what changes in the text when the content does."""
        variants = []
        for probe in _PROBES:
            changed = messages[index] | {"content": probe}
            variants.append(write([*messages[:index], changed, *messages[index + 1 :]], False))
        before = _common_prefix(*variants)
        after = _common_prefix(*(variant[::-1] for variant in variants))[::-1]
        is_framed = text.startswith(before) and text.endswith(after) and len(before) + len(after) <= len(text)
        if _PROBES[0] not in variants[0] or not is_framed:
            raise TokenizerError(
                f"cannot tell which part of the chat template's text is assistant turn {index}: mark it with "
                "{% generation %} in the template, or give one prompt+completion per example"
            )
        end = len(text) - len(after)
        closing = next((token for token in self._special_tokens if after.startswith(token)), "")
        return len(before), end + len(closing)

    def _trim(self, text: str, start: int, end: int) -> int:
        """Leaves out white space behind an end-of-turn token: nobody generates past that token."""
        stripped = start + len(text[start:end].rstrip())
        return stripped if text[start:stripped].endswith(self._special_tokens or ("\0",)) else end


class _GenerationBlock(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: the template itself says what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _common_prefix(first: str, second: str) -> str:
    matches = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return first[: sum(1 for _ in matches)]


def _unmark(text: str) -> Rendered:
    spans, pieces, length = [], [], 0
    for index, part in enumerate(text.split(_OPEN)):
        inside, closed, outside = part.partition(_CLOSE) if index else ("", "", part)
        if closed:
            spans.append((length, length + len(inside)))
        pieces += [inside, outside]
        length += len(inside) + len(outside)
    return Rendered("".join(pieces), tuple(spans))


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
