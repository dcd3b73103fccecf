"""From bodies of requests to what the engine is asked, and from its events to parts of answers."""

import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from popax.errors import ServingError
from popax.serving.http.schemas import ChatRequest, CompletionRequest, Generation
from popax.serving.http.service import Service
from popax.serving.names import Named
from popax.serving.request import GenerationRequest, Reason, TokenLogps
from popax.serving.sampling import Sampling
from popax.serving.structured import ANY_OBJECT
from popax.serving.text import encode_prompt

FINISH = {Reason.STOP: "stop", Reason.LENGTH: "length", Reason.DEADLINE: "length", Reason.CANCELLED: "stop"}


class Asked(NamedTuple):
    """What one body asks for: a request for each choice, prompts in order and `n` for each; and what is the same in
    every part of the answer."""

    requests: list[GenerationRequest]
    prompts: list[list[int]]
    head: dict[str, Any]


def completion(service: Service, tenant: str, named: Named, body: CompletionRequest) -> Asked:
    """Of /v1/completions. Raises ServingError and ConfigError."""
    if body.best_of not in (None, body.n):
        raise ServingError(f"best_of={body.best_of}: only n={body.n} answers are made, none is thrown away")
    prompts = [_tokens(service, prompt) for prompt in _prompts(body.prompt)]
    wants = {"top": body.logprobs, "prompt_logps": body.echo and body.logprobs is not None}
    requests = [
        _request(service, tenant, named, body, tokens, number, max_new_tokens=body.max_tokens, **wants)
        for tokens in prompts
        for number in range(body.n)
    ]
    return Asked(requests, prompts, _head("cmpl", "text_completion", body.model))


def chat(service: Service, tenant: str, named: Named, body: ChatRequest) -> Asked:
    """Of /v1/chat/completions. Raises ServingError, ConfigError, and TokenizerError where there is no template."""
    if body.top_logprobs and not body.logprobs:
        raise ServingError("top_logprobs needs logprobs: true")
    messages = [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.content
            if isinstance(message.content, str)
            else "".join(part.text for part in message.content),
        }
        for message in body.messages
    ]
    tokens = service.tokenizer.chat(messages, add_generation_prompt=True).ids.tolist()
    room = max(1, service.engine.shapes.context - len(tokens))
    most = body.max_completion_tokens or body.max_tokens or room
    top = (body.top_logprobs or 0) if body.logprobs else None
    requests = [
        _request(
            service, tenant, named, body, tokens, number, max_new_tokens=most, top=top, format=body.response_format
        )
        for number in range(body.n)
    ]
    return Asked(requests, [tokens], _head("chatcmpl", "chat.completion", body.model))


def usage(asked: Asked, new: int) -> dict[str, Any]:
    """Tokens of the prompts (each once) and of the answers."""
    prompt = sum(map(len, asked.prompts))
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def completion_logprobs(service: Service, records: Sequence[TokenLogps], offset: int) -> dict[str, Any]:
    """The old shape: parallel lists. offset: of the first token's text in the choice's text."""
    texts, offsets = [service.tokenizer.decode([record.token]) for record in records], []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    decode = service.tokenizer.decode
    return {
        "tokens": texts,
        "token_logprobs": [record.logp for record in records],
        "top_logprobs": [
            {decode([token]): logp for token, logp in record.top} if record.logp is not None else None
            for record in records
        ],
        "text_offset": offsets,
    }


def chat_logprobs(service: Service, records: Sequence[TokenLogps]) -> dict[str, Any]:
    """The new shape: an entry a token."""

    def entry(token: int, logp: float | None) -> dict[str, Any]:
        text = service.tokenizer.decode([token], skip_special_tokens=False)
        return {"token": text, "logprob": logp, "bytes": list(text.encode("utf-8", "surrogatepass"))}

    content = [
        entry(record.token, record.logp) | {"top_logprobs": [entry(*pair) for pair in record.top]} for record in records
    ]
    return {"content": content, "refusal": None}


def _request(
    service: Service, tenant: str, named: Named, body: Generation, tokens: list[int], number: int, **options: Any
) -> GenerationRequest:
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    seed = secrets.randbits(32) if body.seed is None else body.seed
    wanted = options.pop("format", None)
    constraint = None
    if wanted is not None and wanted.type != "text":
        schema = wanted.json_schema.schema_ if wanted.json_schema is not None else ANY_OBJECT
        constraint = service.grammars.json(schema)
    ends = frozenset() if service.tokenizer.eos_id is None else frozenset({int(service.tokenizer.eos_id)})
    return GenerationRequest(
        tokens=tuple(tokens),
        tenant=tenant,
        terms=named.terms,
        sampling=Sampling(
            temperature=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            min_p=body.min_p,
            presence=body.presence_penalty,
            frequency=body.frequency_penalty,
            repetition=body.repetition_penalty,
        ),
        seed=seed + number,
        stops=stops,
        ends=ends,
        priority=body.priority,
        deadline=None if body.timeout_s is None else time.monotonic() + body.timeout_s,
        bias=_bias(body.logit_bias),
        constraint=constraint,
        **options,
    )


def _bias(given: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    wrong = [token for token in given or {} if not (token.isascii() and token.isdigit() and len(token) < 10)]
    if wrong:
        raise ServingError(f"logit_bias has {wrong[0]!r}: its names are token ids")
    return tuple((int(token), value) for token, value in (given or {}).items())


def _prompts(given: Any) -> list[str | list[int]]:
    one = isinstance(given, str) or isinstance(given[0], int)
    return [given] if one else list(given)


def _tokens(service: Service, prompt: str | list[int]) -> list[int]:
    tokens = encode_prompt(service.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
    if not tokens:
        raise ServingError("the prompt is empty, and this tokenizer puts no token before a text: write something")
    return tokens


def _head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}
