"""Generation for a batch of mixed users: one prefill, then one step a token for all rows."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from popax.data.rollouts import RolloutRecord
from popax.errors import DataError
from popax.modeling.cache import Cache, init_cache
from popax.modeling.loss import cross_entropy
from popax.modeling.model import Model
from popax.modeling.virtual import virtual_ids
from popax.serving.sampling import Sampling, sample
from popax.types import NO_ADAPT, ROUTE_DTYPE, Adapt, Params


class Generated(NamedTuple):
    """One row's new tokens (without the end token), whether the end token came, and its record where asked for."""

    tokens: np.ndarray
    ended: bool
    record: RolloutRecord | None = None


class Chosen(NamedTuple):
    """What one call adds: a token for each row, and, where recorded, log p of it and the routes of the call's inputs.

    token: int32 [B]. logp: float32 [B], of the model's own distribution, before temperature and truncation.
    routes: int16 [B, T, L, K], of a model with mixtures.
    """

    token_B: jax.Array
    logp_B: jax.Array | None = None
    routes_BxTxLxK: jax.Array | None = None


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
    mesh: Mesh | None = None,
    record_routes: bool = False,
) -> list[Generated]:
    """Continue each prompt. adapt: NO_ADAPT, or `bind_slots` with a slot for each row.

    mesh: the one that params lie on; its axis `population` spreads the rows, where it divides their number. Where it is
    of several processes, all of them call this with the same arguments and get the same rows.
    record_routes: each row also has a RolloutRecord (of any model: one without mixtures has log-probabilities only).
    seeds: one a row (default 0, 1, ...). Lengths are padded to powers of two, so that few shapes are compiled.
    Raises DataError for an empty batch, a prompt that is empty, holds a token outside the vocabulary or does not fit
    the model's context, and for another number of seeds than prompts.
    """
    sampling = sampling or Sampling()
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise DataError("generation needs at least one prompt, and every prompt at least one token (the BOS, say)")
    _check_request(model, prompts, max_new_tokens, seeds)
    ahead_B = np.zeros(len(prompts), int)
    if adapt.virtual_tokens:
        ahead_B = adapt.virtual_tokens * np.asarray(adapt.outer.has_virtual(len(prompts)), int)
    texts = [[*virtual_ids(ahead), *prompt] for ahead, prompt in zip(ahead_B, prompts, strict=True)]
    lengths = [len(text) for text in texts]
    if max(lengths) + max_new_tokens > model.config.max_seq_len:
        raise DataError(
            f"a prompt of {max(lengths)} tokens{_of_which(ahead_B)} and {max_new_tokens} new ones exceed the model's "
            f"max_seq_len={model.config.max_seq_len}: shorten either"
        )
    width, steps = power_of_two(max(lengths)), power_of_two(max_new_tokens)
    tokens_BxT = np.zeros((len(prompts), width), np.int32)
    positions_BxT = np.full((len(prompts), width), -1, np.int32)
    for row, text in enumerate(texts):
        tokens_BxT[row, : len(text)] = text
        positions_BxT[row, : len(text)] = np.arange(len(text))
    seeds = range(len(prompts)) if seeds is None else seeds
    keys_B = jax.vmap(jax.random.key)(np.asarray(list(seeds), np.uint32))
    end = -1 if end_id is None else end_id
    static = (model, sampling, steps, end, record_routes)
    if mesh is None:
        made = jax.device_get(_generate(*static, params, adapt, tokens_BxT, positions_BxT, keys_B))
    else:
        over, everywhere = _row_shardings(mesh, len(prompts))
        adapt = jax.tree.map(lambda leaf: _spread(leaf, everywhere), adapt)
        tokens_BxT, positions_BxT = _spread(tokens_BxT, over), _spread(positions_BxT, over)
        keys_B = jax.random.wrap_key_data(_spread(jax.random.key_data(keys_B), over))
        with jax.set_mesh(mesh):
            made = _generate(*static, params, adapt, tokens_BxT, positions_BxT, keys_B)
            made = multihost_utils.process_allgather(made, tiled=True)
    new, prompt = made
    rows = [_cut(row, end_id) for row in new.token_B[:, :max_new_tokens]]
    if not record_routes:
        return rows
    if prompt is not None:
        prompt = [routes_TxLxK[ahead:] for ahead, routes_TxLxK in zip(ahead_B, prompt, strict=True)]
    return [row._replace(record=_record(model, row, at, prompts, prompt, new, end)) for at, row in enumerate(rows)]


def _of_which(ahead_B: np.ndarray) -> str:
    return f" ({ahead_B.max()} of them virtual ones)" if ahead_B.any() else ""


def _row_shardings(mesh: Mesh, rows: int) -> tuple[NamedSharding, NamedSharding]:
    """(of arrays [rows, ...], of what is everybody's)."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    spreads = "population" in mesh.axis_names and rows % mesh.shape["population"] == 0
    return NamedSharding(mesh, PartitionSpec("population")) if spreads else everywhere, everywhere


def _spread(value: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A value that every process has, as one array of all of them."""
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _record(model: Model, row: Generated, at: int, prompts, prompt_BxTxLxK, new: Any, end_id: int) -> RolloutRecord:
    """new: as `_generate` returns it, on the host. prompt_BxTxLxK: of prompts' own tokens, None without mixtures."""
    given, written = len(prompts[at]), len(row.tokens) + row.ended
    routes = np.zeros((given + written, *model.routes_shape), ROUTE_DTYPE)
    if prompt_BxTxLxK is not None:
        routes[:given], routes[given:] = prompt_BxTxLxK[at][:given], new.routes_BxTxLxK[at, :written, 0]
    return RolloutRecord(
        tokens_T=np.concatenate([prompts[at], row.tokens, [end_id] * row.ended]).astype(np.int32),
        prompt_length=given,
        logps_T=np.concatenate([np.full(given, np.nan), new.logp_B[at, :written]]).astype(np.float32),
        routes_TxLxK=routes,
        num_experts=model.config.moe.num_experts if model.config.moe else 0,
    )


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


def power_of_two(value: int) -> int:
    """The smallest one that is at least this, and 8 at least: lengths that programs are compiled for."""
    return 1 << max(3, (value - 1).bit_length())


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _generate(model, sampling, steps, end_id, record, params, adapt, tokens_BxT, positions_BxT, keys_B):
    """(new tokens, with their records, [B, steps, ...], the routes of the prompts); after the end a row repeats it."""
    batch, width = tokens_BxT.shape
    cache = init_cache(model.config, batch, width + steps, memory=adapt.memory)
    length_B = jnp.max(positions_BxT, axis=1) + 1

    def body(carry: tuple[Chosen, Cache | None], step: jax.Array):
        last, cache = carry
        place = (last.token_B, length_B + step, cache, keys_B, step + 1)
        following, cache = decode(model, sampling, end_id, params, adapt, *place, record=record)
        return (following._replace(routes_BxTxLxK=None), cache), last._replace(routes_BxTxLxK=following.routes_BxTxLxK)

    first, cache = prefill(model, sampling, params, adapt, tokens_BxT, positions_BxT, cache, keys_B, record=record)
    start = (first._replace(routes_BxTxLxK=None), cache)
    _, new = jax.lax.scan(body, start, jnp.arange(steps, dtype=jnp.int32))
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), new), first.routes_BxTxLxK


def prefill(
    model: Model,
    sampling: Sampling,
    params: Params,
    adapt: Adapt,
    tokens_BxT: jax.Array,
    positions_BxT: jax.Array,
    cache: Cache | None,
    keys_B: jax.Array,
    *,
    record: bool = False,
) -> tuple[Chosen, Cache | None]:
    """(each row's first new token, the cache with its prompt). positions_BxT: -1 after the prompt's end."""
    x_BxTxD, cache, routes = model.forward(
        params, tokens_BxT, positions_BxT=positions_BxT, cache=cache, adapt=adapt, record_routes=record
    )
    last_B = jnp.max(positions_BxT, axis=1)
    last_BxD = jnp.take_along_axis(x_BxTxD, last_B[:, None, None], axis=1)[:, 0]
    chosen = _choose(model, sampling, params, adapt, keys_B, jnp.int32(0), last_BxD, record)
    return chosen._replace(routes_BxTxLxK=routes), cache


def decode(
    model: Model,
    sampling: Sampling,
    end_id: int,
    params: Params,
    adapt: Adapt,
    token_B: jax.Array,
    position_B: jax.Array,
    cache: Cache | None,
    keys_B: jax.Array,
    step: jax.Array,
    *,
    record: bool = False,
) -> tuple[Chosen, Cache | None]:
    """(the token that follows token_B at position_B, the cache with it). step: how many new tokens each row has."""
    x_Bx1xD, cache, routes = model.forward(
        params, token_B[:, None], positions_BxT=position_B[:, None], cache=cache, adapt=adapt, record_routes=record
    )
    chosen = _choose(model, sampling, params, adapt, keys_B, step, x_Bx1xD[:, 0], record)
    token_B = jnp.where(token_B == end_id, token_B, chosen.token_B)
    return chosen._replace(token_B=token_B, routes_BxTxLxK=routes), cache


def _choose(model, sampling, params, adapt, keys_B, step, x_BxD, record) -> Chosen:
    keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys_B)
    logits_BxV = model.logits(params, x_BxD[:, None], adapt=adapt)[:, 0]
    token_B = sample(sampling, keys, logits_BxV)
    return Chosen(token_B, -cross_entropy(logits_BxV, token_B) if record else None)
