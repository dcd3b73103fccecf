"""What the engine refuses before it takes it, and what kept a request from being answered."""

import concurrent.futures

from popax.errors import ServingError
from popax.modeling.base import Base
from popax.serving.request import Answer, GenerationRequest
from popax.serving.rooms import Rooms
from popax.serving.step import BIASES, TOP


def check_request(request: GenerationRequest, base: Base, context: int, rooms: Rooms | None) -> int:
    """How many virtual tokens its adapters put before its prompt. Raises ServingError where it can never be answered as
    it is."""
    vocab, prompt, new = base.model.config.vocab_size, request.tokens, request.max_new_tokens
    if not prompt or new < 0:
        raise ServingError(f"a prompt of {len(prompt)} tokens and {new} new ones: at least 1, and 0")
    ids = [*prompt, *(token for token, _ in request.bias)]
    if min(ids) < 0 or max(ids) >= vocab:
        raise ServingError(f"token {min(ids) if min(ids) < 0 else max(ids)} is outside the vocabulary of {vocab}")
    if len(request.bias) > BIASES or (request.top or 0) > TOP:
        raise ServingError(f"{len(request.bias)} biases and {request.top} alternatives: at most {BIASES} and {TOP}")
    for manifest, _ in request.terms:
        if manifest.base_digest != base.digest:
            raise ServingError(
                f"{manifest.shown} was made for the base {manifest.base_digest}, this server has {base.digest}"
            )
    ahead = 0
    if request.terms:
        if rooms is None:
            raise ServingError("this server has no catalog: it answers for the base alone")
        rooms.check(request.terms)
        ahead = rooms.virtual_tokens(request.terms)
    if ahead + len(prompt) + max(1, new) > context:
        own = f", {ahead} virtual ones before it" if ahead else ""
        raise ServingError(
            f"a prompt of {len(prompt)} tokens{own} and {new} new ones are more than the context of {context} tokens: "
            "shorten either"
        )
    return ahead


def load_error(answer: Answer) -> BaseException | None:
    """What kept a row of its adapters from being read; it is `ready`."""
    failed = (row.exception() for row in answer.loading or () if isinstance(row, concurrent.futures.Future))
    return next((error for error in failed if error is not None), None)
