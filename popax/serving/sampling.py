"""From logits to the next token."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from popax.errors import ConfigError

NOBODY = -1  # in the place of a token id that is none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep the whole vocabulary.

    min_p: keep what is at least so likely, as a part of the likeliest token's probability (arXiv 2407.01082).
    presence, frequency: taken off the logit of a token that was generated, once, and as often as it was (OpenAI's
    API). repetition: divides positive logits of what the prompt or the answer held, and multiplies negative ones (arXiv
    1909.05858); 1 is none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0

    def __post_init__(self):
        finite = all(np.isfinite(value) for value in dataclasses.astuple(self))
        shape = self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1 and 0 <= self.min_p <= 1
        if (
            not finite
            or not shape
            or not (abs(self.presence) <= 2 and abs(self.frequency) <= 2 and self.repetition > 0)
        ):
            raise ConfigError(
                f"{self}: needs finite values, temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1, presence "
                "and frequency from -2 to 2, repetition above 0"
            )

    @property
    def penalises(self) -> bool:
        return self.presence != 0 or self.frequency != 0 or self.repetition != 1


class SamplingRows(NamedTuple):
    """Rules of B rows, float32 [B] but for top_k, int32 [B]."""

    temperature: jax.Array | np.ndarray
    top_k: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray
    min_p: jax.Array | np.ndarray
    presence: jax.Array | np.ndarray
    frequency: jax.Array | np.ndarray
    repetition: jax.Array | np.ndarray

    @classmethod
    def of(cls, rules: list[Sampling]) -> "SamplingRows":
        columns = zip(*(dataclasses.astuple(rule) for rule in rules), strict=True)
        kinds = {"top_k": np.int32}
        return cls(*(np.asarray(column, kinds.get(name, np.float32)) for name, column in zip(cls._fields, columns)))


class History(NamedTuple):
    """What rows hold already: int32 [B, S], NOBODY beyond; the first `prompt` of a row's are its prompt's."""

    tokens_BxS: jax.Array | np.ndarray
    prompt_B: jax.Array | np.ndarray


def sample(rule: Sampling, key_B: jax.Array, logits_BxV: jax.Array) -> jax.Array:
    """The next token of each row, int32 [B]; a row draws from its own key and never depends on its neighbours."""
    rows = SamplingRows.of([rule] * logits_BxV.shape[0])
    return sample_rows(rows, key_B, logits_BxV) if rule.temperature else _likeliest(logits_BxV)


def sample_rows(rows: SamplingRows, key_B: jax.Array, logits_BxV: jax.Array) -> jax.Array:
    """`sample`, with a rule a row. Temperature comes first, then top_k, top_p, min_p; penalties are `penalised`'s."""
    cold_B = jnp.asarray(rows.temperature) <= 0

    def drawn() -> jax.Array:
        warm_B = jnp.where(cold_B, jnp.float32(1), rows.temperature)
        kept_BxV = _kept(rows, logits_BxV / warm_B[:, None])
        return jnp.where(cold_B, _likeliest(logits_BxV), jax.vmap(jax.random.categorical)(key_B, kept_BxV))

    # Sorting a vocabulary costs more than a small model's step: greedy batches do without.
    token_B = jax.lax.cond(jnp.all(cold_B), lambda: _likeliest(logits_BxV), lambda: drawn().astype(jnp.int32))
    return token_B


def penalised(rows: SamplingRows, history: History, logits_BxV: jax.Array) -> jax.Array:
    """The logits with each row's penalties on them; those of rows without any keep their bits."""

    def counted(tokens_S: jax.Array, from_S: jax.Array) -> jax.Array:
        place_S = jnp.where(from_S & (tokens_S >= 0), tokens_S, logits_BxV.shape[1])
        return jnp.zeros(logits_BxV.shape[1], jnp.float32).at[place_S].add(1.0, mode="drop")

    tokens_BxS = jnp.asarray(history.tokens_BxS)
    written_BxS = jnp.arange(tokens_BxS.shape[1])[None, :] >= jnp.asarray(history.prompt_B)[:, None]
    seen_BxV = jax.vmap(counted)(tokens_BxS, jnp.ones_like(written_BxS)) > 0
    count_BxV = jax.vmap(counted)(tokens_BxS, written_BxS)
    repetition_Bx1 = jnp.asarray(rows.repetition)[:, None]
    harder_BxV = jnp.where(logits_BxV > 0, logits_BxV / repetition_Bx1, logits_BxV * repetition_Bx1)
    logits_BxV = jnp.where(seen_BxV & (repetition_Bx1 != 1), harder_BxV, logits_BxV)
    presence_Bx1, frequency_Bx1 = jnp.asarray(rows.presence)[:, None], jnp.asarray(rows.frequency)[:, None]
    less_BxV = logits_BxV - presence_Bx1 * jnp.minimum(count_BxV, 1.0) - frequency_Bx1 * count_BxV
    return jnp.where(count_BxV > 0, less_BxV, logits_BxV)


def _likeliest(logits_BxV: jax.Array) -> jax.Array:
    return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)


def _kept(rows: SamplingRows, logits_BxV: jax.Array) -> jax.Array:
    """-inf outside top_k, the nucleus of top_p (arXiv 1904.09751: the fewest likeliest tokens that reach it), min_p."""
    vocab, nothing = logits_BxV.shape[1], jnp.float32(-jnp.inf)
    descending_BxV = -jnp.sort(-logits_BxV, axis=-1)
    last_B = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocab), vocab).astype(jnp.int32) - 1
    kth_Bx1 = jnp.take_along_axis(descending_BxV, last_B[:, None], axis=-1)
    descending_BxV = jnp.where(descending_BxV < kth_Bx1, nothing, descending_BxV)
    probs_BxV = jax.nn.softmax(descending_BxV, axis=-1)
    before_BxV = jnp.cumsum(probs_BxV, axis=-1) - probs_BxV
    top_p_Bx1, min_p_Bx1 = jnp.asarray(rows.top_p)[:, None], jnp.asarray(rows.min_p)[:, None]
    inside_BxV = (before_BxV < top_p_Bx1) & (probs_BxV >= min_p_Bx1 * probs_BxV[:, :1])
    floor_Bx1 = jnp.min(jnp.where(inside_BxV, descending_BxV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BxV < floor_Bx1, nothing, logits_BxV)
