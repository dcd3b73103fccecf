"""One step of the engine: tokens of many sequences, whatever each of them is at, through the model together.

A step has R rows of one token (sequences that decode), and G groups of T tokens (parts of prompts, a group's of one
sequence). Each row, and each group's last token, gives logits and a sampled token; the host takes those it wants.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from popax.adapters.apply import bind_slots
from popax.adapters.chain import chain
from popax.adapters.cohort import Cohort
from popax.modeling.cache import PagedCache, RaggedCache
from popax.modeling.model import Model
from popax.serving.sampling import NOBODY, History, SamplingRows, penalised, sample_rows
from popax.types import Adapt, AdapterState, Params

TOP = 20  # alternatives that a token's record may list, as many as OpenAI's API allows
BIASES = 64  # logits of a row that a request may move


@dataclasses.dataclass(frozen=True, order=True)
class StepShape:
    """What a step is compiled for: R rows, G groups of T tokens, n pages a sequence."""

    rows: int
    groups: int
    width: int
    pages: int

    @property
    def tokens(self) -> int:
        return self.rows + self.groups * self.width

    @property
    def samples(self) -> int:
        return self.rows + self.groups


class StepInputs(NamedTuple):
    """M = R + G T tokens; B = R + G sampled rows. Numpy on the way in.

    tokens, positions: int32 [M], position -1 for none. row_pages: int32 [R, n]; group_pages: int32 [G, n]. last: int32
    [G], the number in its group of the token that is sampled from. seed: uint32 [B]; made: int32 [B], how many tokens
    the row has been given before. bias_ids: int32 [B, BIASES]. allowed: uint32 [B, ceil(V/32)], a bit a token.
    targets: int32 [G, T], the token that follows each, NOBODY where its probability is not asked for.
    wants_top: bool, whether any row wants its alternatives.
    """

    tokens_M: Any
    positions_M: Any
    row_pages_RxN: Any
    group_pages_GxN: Any
    last_G: Any
    seed_B: Any
    made_B: Any
    rules: SamplingRows
    history: History
    bias_ids_BxK: Any
    bias_BxK: Any
    allowed_BxW: Any
    targets_GxT: Any
    wants_top: Any


class Logps(NamedTuple):
    """log p of tokens in the model's own distribution, before penalties and temperature, and of the TOP likeliest."""

    logp: jax.Array
    top_ids: jax.Array
    top_logps: jax.Array


class StepOutputs(NamedTuple):
    """token: int32 [B], the sampled ones; own: theirs [B]; prompt: of `targets` [G, T]."""

    token_B: jax.Array
    own: Logps
    prompt: Logps


class SlotSets(NamedTuple):
    """One cohort's slots: {site: {leaf: [L, S, ...]}}, what its users share, and for each term of a sum the slots
    of the B rows, with the term's weight: int32 [B], float32 [B]."""

    arrays: AdapterState
    shared: AdapterState
    slots: tuple[Any, ...]
    weights: tuple[Any, ...]


def serve_step(
    model: Model,
    shape: StepShape,
    cohorts: tuple[Cohort, ...],
    kernel: bool,
    params: Params,
    pages: tuple[jax.Array, ...],
    sets: tuple[SlotSets, ...],
    inputs: StepInputs,
) -> tuple[tuple[jax.Array, ...], StepOutputs]:
    """(the pages with these tokens written, what was sampled). Static: model, shape, cohorts (one for each of sets),
    kernel (pages in the layout of `ragged`). pages: the last of them are what adapters remember, where some do."""
    rows, groups, width = shape.rows, shape.groups, shape.width
    pages, memory = (pages[:-1], pages[-1]) if any(cohort.memory for cohort in cohorts) else (pages, None)
    cache = (RaggedCache if kernel else PagedCache)(pages, inputs.row_pages_RxN, inputs.group_pages_GxN, memory)
    x_Mx1xD, cache = model.hidden(
        params,
        inputs.tokens_M[:, None],
        positions_BxT=inputs.positions_M[:, None],
        cache=cache,
        adapt=_adapt(cohorts, sets, rows),
    )
    assert isinstance(cache, PagedCache | RaggedCache)
    x_GxTxD = x_Mx1xD[rows:, 0].reshape(groups, width, x_Mx1xD.shape[-1])
    last_GxD = jnp.take_along_axis(x_GxTxD, inputs.last_G[:, None, None], axis=1)[:, 0]
    x_BxD = jnp.concatenate((x_Mx1xD[:rows, 0], last_GxD))
    heads = _adapt(cohorts, sets, None)
    logits_BxV = model.logits(params, x_BxD[:, None], adapt=heads)[:, 0]
    token_B = _sampled(inputs, logits_BxV)
    own = _logps(logits_BxV, token_B, inputs.wants_top)
    prompt = _prompt_logps(model, params, _of_groups(sets, rows), cohorts, x_GxTxD, inputs)
    written = cache.pages if cache.memory is None else (*cache.pages, cache.memory)
    return written, StepOutputs(token_B, own, prompt)


def _adapt(cohorts: tuple[Cohort, ...], sets: tuple[SlotSets, ...], rows: int | None) -> Adapt:
    return chain(
        [
            bind_slots(cohort, each.arrays, each.shared, slot_B, rows=rows, weight_B=weight_B)
            for cohort, each in zip(cohorts, sets, strict=True)
            for slot_B, weight_B in zip(each.slots, each.weights, strict=True)
        ]
    )


def _of_groups(sets: tuple[SlotSets, ...], rows: int) -> tuple[SlotSets, ...]:
    return tuple(
        each._replace(
            slots=tuple(slot_B[rows:] for slot_B in each.slots),
            weights=tuple(weight_B[rows:] for weight_B in each.weights),
        )
        for each in sets
    )


def _sampled(inputs: StepInputs, logits_BxV: jax.Array) -> jax.Array:
    rules, vocab = inputs.rules, logits_BxV.shape[1]
    asks = (rules.presence != 0) | (rules.frequency != 0) | (rules.repetition != 1)
    logits_BxV = jax.lax.cond(jnp.any(asks), lambda: penalised(rules, inputs.history, logits_BxV), lambda: logits_BxV)
    rows_Bx1 = jnp.arange(logits_BxV.shape[0])[:, None]

    def biased() -> jax.Array:
        where_BxK = jnp.where(inputs.bias_ids_BxK >= 0, inputs.bias_ids_BxK, vocab)
        return logits_BxV.at[rows_Bx1, where_BxK].add(inputs.bias_BxK, mode="drop")

    logits_BxV = jax.lax.cond(jnp.any(inputs.bias_ids_BxK >= 0), biased, lambda: logits_BxV)

    def masked() -> jax.Array:
        bits = jnp.arange(vocab, dtype=jnp.uint32)
        words_BxV = inputs.allowed_BxW[:, (bits // 32).astype(jnp.int32)]
        may_BxV = (words_BxV >> (bits % 32)[None, :]) & jnp.uint32(1)
        return jnp.where(may_BxV != 0, logits_BxV, jnp.float32(-jnp.inf))

    free = jnp.all(inputs.allowed_BxW == jnp.uint32(0xFFFFFFFF))
    logits_BxV = jax.lax.cond(free, lambda: logits_BxV, masked)
    keys_B = jax.vmap(lambda seed, made: jax.random.fold_in(jax.random.key(seed), made))(inputs.seed_B, inputs.made_B)
    return sample_rows(rules, keys_B, logits_BxV)


def _logps(logits: jax.Array, token: jax.Array, wants: jax.Array) -> Logps:
    """Of logits [..., V] and tokens [...]. Where nobody wants them there are zeros."""
    shape, top = token.shape, min(TOP, logits.shape[-1])

    def counted() -> Logps:
        logps = jax.nn.log_softmax(logits, axis=-1)
        own = jnp.take_along_axis(logps, jnp.maximum(token, 0)[..., None], axis=-1)[..., 0]
        values, ids = jax.lax.top_k(logps, top)
        return Logps(own, ids.astype(jnp.int32), values)

    nothing = Logps(jnp.zeros(shape), jnp.zeros((*shape, top), jnp.int32), jnp.zeros((*shape, top)))
    return jax.lax.cond(wants, counted, lambda: nothing)


def _prompt_logps(model, params, sets, cohorts, x_GxTxD, inputs: StepInputs) -> Logps:
    groups, width = inputs.targets_GxT.shape
    top = min(TOP, model.config.vocab_size)
    nothing = Logps(
        jnp.zeros((groups, width)), jnp.zeros((groups, width, top), jnp.int32), jnp.zeros((groups, width, top))
    )
    if not groups:
        return nothing

    def counted() -> Logps:
        logits_GxTxV = model.logits(params, x_GxTxD, adapt=_adapt(cohorts, sets, None))
        return _logps(logits_GxTxV, inputs.targets_GxT, jnp.bool_(True))

    return jax.lax.cond(jnp.any(inputs.targets_GxT != NOBODY), counted, lambda: nothing)


def empty_inputs(shape: StepShape, vocab_size: int, history: int) -> StepInputs:
    """A step of nobody's tokens. history: how many tokens a row's history holds at most."""
    samples = shape.samples
    ones, zeros = np.ones(samples, np.float32), np.zeros(samples, np.float32)
    return StepInputs(
        tokens_M=np.zeros(shape.tokens, np.int32),
        positions_M=np.full(shape.tokens, -1, np.int32),
        row_pages_RxN=np.zeros((shape.rows, shape.pages), np.int32),
        group_pages_GxN=np.zeros((shape.groups, shape.pages), np.int32),
        last_G=np.zeros(shape.groups, np.int32),
        seed_B=np.zeros(samples, np.uint32),
        made_B=np.zeros(samples, np.int32),
        rules=SamplingRows(zeros, np.zeros(samples, np.int32), ones, zeros, zeros, zeros, ones),
        history=History(np.full((samples, history), NOBODY, np.int32), np.zeros(samples, np.int32)),
        bias_ids_BxK=np.full((samples, BIASES), NOBODY, np.int32),
        bias_BxK=np.zeros((samples, BIASES), np.float32),
        allowed_BxW=np.full((samples, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32),
        targets_GxT=np.full((shape.groups, shape.width), NOBODY, np.int32),
        wants_top=np.bool_(False),
    )
