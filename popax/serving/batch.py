"""A step's plan as arrays, and what of its outputs is whose."""

from collections.abc import Iterator

import numpy as np

from popax.serving.request import Answer, TokenLogps
from popax.serving.sampling import Sampling, SamplingRows
from popax.serving.scheduler import Plan
from popax.serving.step import StepInputs, StepOutputs, StepShape

_PLAIN = Sampling()


def filled(empty: StepInputs, shape: StepShape, plan: Plan) -> tuple[StepInputs, dict[int, Answer]]:
    """(the plan's arrays, whose each sampled row is). Arrays that nobody in the plan needs stay the empty step's."""
    owners = dict(enumerate(plan.rows))
    owners |= {shape.rows + at: part.answer for at, part in enumerate(plan.parts)}
    tokens_M, positions_M = empty.tokens_M.copy(), empty.positions_M.copy()
    row_pages, group_pages, last_G = empty.row_pages_RxN.copy(), empty.group_pages_GxN.copy(), empty.last_G.copy()
    for row, answer in enumerate(plan.rows):
        tokens_M[row], positions_M[row] = answer.tokens[-1], len(answer.tokens) - 1
        row_pages[row, : len(answer.pages)] = answer.pages
    for group, (answer, start, count) in enumerate(plan.parts):
        at = shape.rows + group * shape.width
        tokens_M[at : at + count] = answer.tokens[start : start + count]
        positions_M[at : at + count] = np.arange(start, start + count)
        group_pages[group, : len(answer.pages)] = answer.pages
        last_G[group] = count - 1
    seed_B, made_B = empty.seed_B.copy(), empty.made_B.copy()
    for row, answer in owners.items():
        seed_B[row], made_B[row] = answer.request.seed % 2**32, answer.made
    inputs = empty._replace(
        tokens_M=tokens_M,
        positions_M=positions_M,
        row_pages_RxN=row_pages,
        group_pages_GxN=group_pages,
        last_G=last_G,
        seed_B=seed_B,
        made_B=made_B,
        targets_GxT=_targets(empty, plan),
        wants_top=np.bool_(any(answer.request.top is not None for answer in owners.values())),
    )
    return _sampling(inputs, shape, owners), owners


def _sampling(inputs: StepInputs, shape: StepShape, owners: dict[int, Answer]) -> StepInputs:
    requests = {row: answer.request for row, answer in owners.items()}
    if any(request.sampling != _PLAIN for request in requests.values()):
        rules = [requests[row].sampling if row in requests else _PLAIN for row in range(shape.samples)]
        inputs = inputs._replace(rules=SamplingRows.of(rules))
    if any(request.sampling.penalises for request in requests.values()):
        history = inputs.history._replace(
            tokens_BxS=inputs.history.tokens_BxS.copy(), prompt_B=inputs.history.prompt_B.copy()
        )
        for row, answer in owners.items():
            own = answer.tokens[len(answer.ahead) :]  # virtual tokens are in no vocabulary
            history.tokens_BxS[row, : len(own)], history.prompt_B[row] = own, len(answer.request.tokens)
        inputs = inputs._replace(history=history)
    if any(request.bias for request in requests.values()):
        ids, values = inputs.bias_ids_BxK.copy(), inputs.bias_BxK.copy()
        for row, request in requests.items():
            for at, (token, value) in enumerate(request.bias):
                ids[row, at], values[row, at] = token, value
        inputs = inputs._replace(bias_ids_BxK=ids, bias_BxK=values)
    if any(request.constraint is not None for request in requests.values()):
        allowed = inputs.allowed_BxW.copy()
        for row, request in requests.items():
            if request.constraint is not None:
                request.constraint.allowed(allowed[row])
        inputs = inputs._replace(allowed_BxW=allowed)
    return inputs


def _targets(empty: StepInputs, plan: Plan) -> np.ndarray:
    """The prompt's next token at each token of a group, of those who want its probability."""
    if not any(part.answer.request.prompt_logps for part in plan.parts):
        return empty.targets_GxT
    targets_GxT = empty.targets_GxT.copy()
    for group, (answer, start, count) in enumerate(plan.parts):
        if answer.request.prompt_logps:
            for at, token in _following(answer, start, count):
                targets_GxT[group, at] = token
    return targets_GxT


def _following(answer: Answer, start: int, count: int) -> Iterator[tuple[int, int]]:
    """(place in the group, the token that follows there), for the prompt's own tokens but the first."""
    first, prompt = len(answer.ahead) + 1, answer.tokens[: answer.prompt]
    return ((at - start - 1, prompt[at]) for at in range(max(first, start + 1), min(len(prompt), start + 1 + count)))


def records(plan: Plan, outputs: StepOutputs) -> Iterator[tuple[Answer, list[TokenLogps]]]:
    """What the step says of prompts' tokens, for those who want it; the first token of a prompt has no probability."""
    for group, (answer, start, count) in enumerate(plan.parts):
        if not answer.request.prompt_logps or answer.made:
            continue
        made = [TokenLogps(answer.request.tokens[0], None)] if start == 0 else []
        top = answer.request.top or 0
        for at, token in _following(answer, start, count):
            ids, values = outputs.prompt.top_ids[group, at, :top], outputs.prompt.top_logps[group, at, :top]
            likeliest = tuple(zip(ids.tolist(), values.tolist(), strict=True))
            made.append(TokenLogps(token, float(outputs.prompt.logp[group, at]), likeliest))
        yield answer, made


def sampled_record(outputs: StepOutputs, row: int, token: int, top: int | None) -> TokenLogps:
    """Of a sampled token; `top` alternatives, None for no record."""
    if top is None:
        return TokenLogps(token, None)
    likeliest = zip(outputs.own.top_ids[row, :top].tolist(), outputs.own.top_logps[row, :top].tolist(), strict=True)
    return TokenLogps(token, float(outputs.own.logp[row]), tuple(likeliest))
