"""Tokens to text as they come, and the texts at which an answer stops."""

from collections.abc import Callable, Sequence

from popax.data.tokenize import Tokenizer

_UNFINISHED = "�"
_WINDOW = 8  # tokens that are decoded again with a new one: what joins its neighbours (spaces, bytes) needs a few


class TextStream:
    """The text of one answer. `push` gives what is certain by now: bytes of a half-written character wait for the rest,
    and so does what may be the beginning of a stop text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()):
        self._decode, self._stops = decode, tuple(stop for stop in stops if stop)
        self._tokens: list[int] = []
        self._before = 0  # tokens whose text is settled
        self._pending = ""  # text that may belong to a stop
        self.stopped: str | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> "TextStream":
        return cls(lambda tokens: tokenizer.decode(list(tokens)), stops)

    def push(self, token: int) -> str:
        """The text that this token makes certain; nothing more after `stopped`."""
        if self.stopped is not None:
            return ""
        self._tokens.append(token)
        text = self._new_text()
        if text is None:
            return ""
        return self._until_stop(self._pending + text)

    def finish(self) -> str:
        """What was held back, where no stop text came after all."""
        if self.stopped is not None:
            return ""
        tail = self._decode(self._tokens[self._start() :])[
            len(self._decode(self._tokens[self._start() : self._before])) :
        ]
        rest = self._until_stop(self._pending + tail)
        return rest if self.stopped is not None else rest + self._pending

    def _start(self) -> int:
        return max(0, self._before - _WINDOW)

    def _new_text(self) -> str | None:
        # A few settled tokens come first: what a token is written as may depend on those before it.
        start = self._start()
        old = self._decode(self._tokens[start : self._before])
        whole = self._decode(self._tokens[start:])
        if whole.endswith(_UNFINISHED) and len(self._tokens) - self._before < _WINDOW:
            return None
        self._before = len(self._tokens)
        return whole[len(old) :]

    def _until_stop(self, text: str) -> str:
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, self.stopped = min(found)
            self._pending = ""
            return text[:at]
        # The longest end that a stop begins with.
        keep = max(
            (length for stop in self._stops for length in range(1, len(stop)) if text.endswith(stop[:length])),
            default=0,
        )
        self._pending = text[len(text) - keep :]
        return text[: len(text) - keep]
