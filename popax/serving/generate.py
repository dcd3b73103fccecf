"""Generation for a batch of mixed users: one prefill, then one step a token for all rows."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from popax.errors import DataError
from popax.modeling.cache import KVCache, init_cache
from popax.modeling.model import Model
from popax.serving.sampling import Sampling, sample
from popax.types import NO_ADAPT, Adapt, Params


class Generated(NamedTuple):
    """One row's new tokens (without the end token), and whether the end token came."""

    tokens: np.ndarray
    ended: bool


def generate(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    adapt: Adapt = NO_ADAPT,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    end_id: int | None = None,
) -> list[Generated]:
    """Continue each prompt. adapt: NO_ADAPT, or `bind_slots` with a slot for each row.

    seeds: one a row (default 0, 1, ...). Lengths are padded to powers of two, so that few shapes are compiled.
    Raises DataError for an empty batch, a prompt that is empty, holds a token outside the vocabulary or does not fit
    the model's context, and for another number of seeds than prompts.
    """
    sampling = sampling or Sampling()
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise DataError("generation needs at least one prompt, and every prompt at least one token (the BOS, say)")
    _check_request(model, prompts, max_new_tokens, seeds)
    if max(lengths) + max_new_tokens > model.config.max_seq_len:
        raise DataError(
            f"a prompt of {max(lengths)} tokens and {max_new_tokens} new ones exceed the model's "
            f"max_seq_len={model.config.max_seq_len}: shorten either"
        )
    width, steps = _power_of_two(max(lengths)), _power_of_two(max_new_tokens)
    tokens_BxT = np.zeros((len(prompts), width), np.int32)
    positions_BxT = np.full((len(prompts), width), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BxT[row, : len(prompt)] = prompt
        positions_BxT[row, : len(prompt)] = np.arange(len(prompt))
    seeds = range(len(prompts)) if seeds is None else seeds
    keys_B = jax.vmap(jax.random.key)(np.asarray(list(seeds), np.uint32))
    out_BxT = np.asarray(
        _generate(
            model, sampling, steps, -1 if end_id is None else end_id, params, adapt, tokens_BxT, positions_BxT, keys_B
        )
    )[:, :max_new_tokens]
    return [_cut(row, end_id) for row in out_BxT]


def _check_request(
    model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, seeds: Sequence[int] | None
) -> None:
    if max_new_tokens < 1:
        raise DataError(f"max_new_tokens={max_new_tokens}: at least 1")
    if seeds is not None and len(seeds) != len(prompts):
        raise DataError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one a row, or none")
    for row, prompt in enumerate(prompts):
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= model.config.vocab_size:
            raise DataError(
                f"prompt {row} holds token {low if low < 0 else high}, the model's vocabulary has "
                f"{model.config.vocab_size}: encode it with the base's own tokenizer"
            )


def _cut(tokens_T: np.ndarray, end_id: int | None) -> Generated:
    ends = np.flatnonzero(tokens_T == end_id) if end_id is not None else np.zeros(0, int)
    return Generated(tokens_T[: ends[0]], True) if ends.size else Generated(tokens_T, False)


def _power_of_two(value: int) -> int:
    return 1 << max(3, (value - 1).bit_length())


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(model, sampling, steps, end_id, params, adapt, tokens_BxT, positions_BxT, keys_B):
    """New tokens, int32 [B, steps]; after the end token a row repeats it."""
    batch, width = tokens_BxT.shape
    cache = init_cache(model.config, batch, width + steps)
    x_BxTxD, cache = model.hidden(params, tokens_BxT, positions_BxT=positions_BxT, cache=cache, adapt=adapt)
    length_B = jnp.max(positions_BxT, axis=1) + 1
    last_BxD = jnp.take_along_axis(x_BxTxD, (length_B - 1)[:, None, None], axis=1)[:, 0]

    def choose(step: jax.Array, x_BxD: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys_B)
        return sample(sampling, keys, model.logits(params, x_BxD[:, None], adapt=adapt)[:, 0])

    def body(carry: tuple[jax.Array, KVCache], step: jax.Array):
        token_B, cache = carry
        x_Bx1xD, cache = model.hidden(
            params, token_B[:, None], positions_BxT=(length_B + step)[:, None], cache=cache, adapt=adapt
        )
        following_B = jnp.where(token_B == end_id, token_B, choose(step + 1, x_Bx1xD[:, 0]))
        return (following_B, cache), token_B

    first_B = choose(jnp.int32(0), last_BxD)
    _, tokens_TxB = jax.lax.scan(body, (first_B, cache), jnp.arange(steps, dtype=jnp.int32))
    return tokens_TxB.T
