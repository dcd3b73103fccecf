"""Structured output: which tokens keep an answer inside a JSON schema. The grammar engine is llguidance."""

import json
from typing import Any

import numpy as np

from popax.data.tokenize import Tokenizer
from popax.errors import ServingError

ANY_OBJECT = {"type": "object"}


class Grammars:
    """Makes constraints for one tokenizer. Thread-safe: what they share is read-only."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        """Raises ServingError where llguidance is not installed."""
        try:
            import llguidance
            import llguidance.numpy as bitmasks
        except ImportError as error:
            raise ServingError("structured output needs llguidance: pip install 'popax[serve]'") from error
        self._library, self._bitmasks = llguidance, bitmasks
        ends = None if tokenizer.eos_id is None else int(tokenizer.eos_id)
        self._tokens = llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=ends)

    def json(self, schema: dict[str, Any]) -> "JsonConstraint":
        """Answers that are JSON of this schema. Raises ServingError for a schema that the engine does not take."""
        grammar = self._library.LLMatcher.grammar_from_json_schema(json.dumps(schema))
        if error := self._library.LLMatcher.validate_grammar(grammar, self._tokens):
            raise ServingError(f"the schema cannot be followed: {error}")
        matcher = self._library.LLMatcher(self._tokens, grammar)
        if error := matcher.get_error():
            raise ServingError(f"the schema cannot be followed: {error}")
        return JsonConstraint(matcher, self._bitmasks)


class JsonConstraint:
    """A `popax.serving.request.Constraint`."""

    def __init__(self, matcher: Any, bitmasks: Any):
        self._matcher, self._bitmasks = matcher, bitmasks

    def allowed(self, words_W: np.ndarray) -> None:
        mask = np.full((1, len(words_W)), -1, np.int32)
        self._bitmasks.fill_next_token_bitmask(self._matcher, mask, 0)
        words_W[:] = mask[0].view(np.uint32)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)

    @property
    def ended(self) -> bool:
        return self._matcher.is_stopped()
